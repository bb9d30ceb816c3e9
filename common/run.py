"""One run: its folder, what it logs, what it saves."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import checkpoint
from common.cli import steps_per_iteration
from common.errors import UserError
from common.logger import Logger, create_run_dir, first_not_finite, read_config, write_config


class Run:
    """Bookkeeping that is the same in every script; made by `start_run`."""

    def __init__(self, args: Any, run_dir: Path, config: dict[str, Any]):
        self.args, self.dir, self.config = args, run_dir, config
        self._logger: Logger | None = None
        self._succeeded = np.zeros(args.num_envs, bool)  # in the running episodes
        self._finished: list[bool] = []  # success_once of the episodes since the last row
        self.evaluation: dict[str, float] = {}  # the last one

    @property
    def logger(self) -> Logger:
        if self._logger is None:
            self._logger = self._open_logger(resume_from=None)
        return self._logger

    def _open_logger(self, resume_from: int | None) -> Logger:
        return Logger(
            self.dir, self.config, track=self.args.track, project=self.args.wandb_project,
            total_timesteps=self.args.total_timesteps, resume_from=resume_from,
        )

    def save(self, env_steps: int, tree: Any, rings: dict, host: dict) -> None:
        """Write a checkpoint; see `common.checkpoint.save`."""
        mine = {"succeeded": self._succeeded, "finished": self._finished,
                "evaluation": self.evaluation}
        checkpoint.save(self.dir, env_steps, tree, rings, {"script": host, "run": mine})

    def load(self, tree: Any, rings: dict) -> tuple[Any, dict, dict]:
        """The newest usable checkpoint's (tree, rings, host); metrics after it are dropped."""
        env_steps, tree, rings, host = checkpoint.load_newest(self.dir, tree, rings)
        mine = host["run"]
        self._succeeded, self._finished = mine["succeeded"], mine["finished"]
        self.evaluation = mine["evaluation"]
        self._logger = self._open_logger(resume_from=env_steps)
        self._logger.say(f"resumed at {env_steps:,} steps")
        return tree, rings, host["script"]

    def is_due(self, every: int, env_steps: int) -> bool:
        """True when `env_steps` has just passed a multiple of `every`, and at the run's end."""
        if env_steps == self.args.total_timesteps:
            return True
        iteration = steps_per_iteration(self.args)
        return every > 0 and env_steps // every > (env_steps - iteration) // every

    def video_path(self, env_steps: int) -> Path | None:
        return self.dir / "videos" / f"{env_steps:08d}.mp4" if self.args.capture_video else None

    def count_episodes(self, success: np.ndarray, truncated: np.ndarray) -> None:
        """Note one step's success and truncation, both [num_envs] bool."""
        self._succeeded = self._succeeded | success
        self._finished += self._succeeded[truncated].tolist()
        self._succeeded = self._succeeded & ~truncated

    def forget_episodes(self) -> None:
        """The running episodes have been given up: none has succeeded so far."""
        self._succeeded[:] = False

    def log_evaluation(self, env_steps: int, evaluation: dict[str, float]) -> None:
        self.evaluation = {key: float(value) for key, value in evaluation.items()}
        self.logger.log(env_steps, self.evaluation)

    def log_training(self, env_steps: int, stage: str, metrics: dict[str, Any]) -> None:
        """Write a row of metrics and refresh the live line.

        Raises:
            UserError: a metric is not finite: the run has diverged.
        """
        row = {key: float(value) for key, value in jax.device_get(metrics).items()}
        bad = first_not_finite(row)
        if bad is not None:
            raise UserError(f"{bad} is {row[bad]} at step {env_steps}: the run has diverged; its "
                            f"last checkpoint before that is in {self.dir}")
        train = "-"
        if self._finished:
            row["charts/success_once"] = float(np.mean(self._finished))
            train = f"{row['charts/success_once']:.0%}"
        row["time/steps_per_second"] = self.logger.speed(env_steps)
        self._finished = []
        self.logger.log(env_steps, row)
        evaluated = self.evaluation.get("eval/success_once")
        self.logger.live(env_steps, **{
            "steps/s": f"{row['time/steps_per_second']:.0f}",
            "success: train": train,
            "eval": "-" if evaluated is None else f"{evaluated:.0%}",
            "phase": stage,
        })

    def close(self) -> None:
        if self.evaluation:
            self.logger.say(
                f"final policy: success_once {self.evaluation['eval/success_once']:.0%}, "
                f"success_at_end {self.evaluation['eval/success_at_end']:.0%}; run folder: "
                f"{self.dir}"
            )
        self.logger.close()


def start_run(args: Any, script: str, rings: dict, **facts: Any) -> Run:
    """Claim a run folder and write its config.json; with --resume, open the existing one.

    Args:
        args: the script's arguments.
        script: its name.
        rings: its ring buffers, for the check that the disk can hold their checkpoints.
        facts: what else belongs into config.json, e.g. the VLM's id.
    """
    facts["jax_devices"] = [str(device) for device in jax.devices()]
    if args.resume:
        run_dir = Path(args.resume)
        return Run(args, run_dir, read_config(run_dir))
    checkpoint.check_space(Path(args.run_dir or "runs"), rings, args.total_timesteps)
    run_dir = create_run_dir(args.run_dir, args.env_id, script, args.seed)
    run = Run(args, run_dir, write_config(run_dir, args, script=script, **facts))
    run.logger.say(f"run folder: {run_dir}")
    for key, value in facts.items():
        run.logger.say(f"  {key}: {value}")
    return run
