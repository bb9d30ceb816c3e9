"""One run: its folder, what it logs, what it saves, and how it is stopped."""

import contextlib
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import checkpoint, policies
from common.cli import script_name, source_file
from common.envs.registry import suite_for
from common.envs.rendering import gl_info
from common.envs.workers import STOP_SIGNALS, Step
from common.errors import UserError
from common.evaluate import Evaluator, write_video
from common.logger import Logger, first_not_finite, show
from common.replay import Sizes
from common.run_folder import (
    VIDEOS,
    create_run_dir,
    lock_run_dir,
    note_continuation,
    read_config,
    store_config,
    unlock_run_dir,
    write_config,
)
from common.vlms import VLM, View, check_same_vlm

copy_arrays = jax.jit(partial(jax.tree.map, jnp.copy))


class Run:
    """Bookkeeping that is the same in every script; made by `start_run`.

    Args:
        args: the script's arguments.
        run_dir: its folder.
        config: what its config.json holds.
        envs: the environments of training, which `close` closes.
        evaluator: what plays evaluations; `close` closes it too.
        facts: what `config` has too, and may be another one where the run is continued.
    """

    def __init__(
        self, args: Any, run_dir: Path, config: dict[str, Any], envs: Any = None,
        evaluator: Evaluator | None = None, facts: dict[str, Any] | None = None,
    ):
        self.args, self.dir, self.config = args, run_dir, config
        self._environments = [x for x in (evaluator, envs) if x is not None]
        self._evaluator, self._facts = evaluator, facts or {}
        self._pending: Generator | None = None  # plays and logs the evaluation that has begun
        self._steps_each_time = 0  # of its episodes in each iteration of training
        self._policy_names: list[str] = []  # of the arrays that the policy acts by
        self._logger: Logger | None = None
        self.env_steps = 0  # done when the current iteration ends
        self._succeeded = np.zeros(args.num_envs, bool)  # in the running episodes
        self._finished: list[bool] = []  # success_once of the episodes since the last row
        self._shows_returns = suite_for(args.env_id).shows_returns
        self._returns = np.zeros(args.num_envs)  # of the running episodes
        self._finished_returns: list[float] = []
        self.evaluation: dict[str, float] = {}  # the last one
        lock_run_dir(run_dir)
        self._stopped_by: int | None = None  # the first signal
        self._stopped_at = 0.0
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: Any) -> None:
        """One of STOP_SIGNALS: the iteration, or evaluation, is finished and saved first.

        What a checkpoint holds is consistent only between two iterations. A second Ctrl-C ends at
        once. One within a second of the first signal is ignored: a scheduler may send the same
        signal to the process and to its group.
        """
        if self._stopped_by is None:
            self._stopped_by, self._stopped_at = number, time.monotonic()
            with contextlib.suppress(OSError):  # not by print, which may have been interrupted
                os.write(2, b"\nstopping: this iteration is finished and saved first\n")
        elif number == signal.SIGINT and time.monotonic() - self._stopped_at > 1:
            raise KeyboardInterrupt

    @property
    def logger(self) -> Logger:
        if self._logger is None:
            self._logger = Logger(self.dir, self.config, self.args)
        return self._logger

    def begin(self, state: Any, buffers: Any, envs: Any) -> tuple[Any, Any, np.ndarray]:
        """Where the run is to go on: at its first step, or with --resume at its newest checkpoint.

        Args:
            state: the script's networks, freshly initialised.
            buffers: its rings, a NamedTuple of `Ring`s.
            envs: its environments; episodes of a new run have been started by the caller.

        Returns:
            (state, buffers, observations to act on). The arrays are committed to the device, as
            embeddings are: else all would compile again after the first step.
        """
        if self.args.resume:
            self.env_steps, state, rings, host = checkpoint.load_newest(
                self.dir, state, buffers._asdict()
            )
            note_continuation(self.config, self.dir, self.args, self.env_steps,
                              source_file(type(self.args)), self._facts)
            buffers = type(buffers)(**rings)
            self._succeeded, self._finished = host["run"]["succeeded"], host["run"]["finished"]
            self._returns = host["run"]["returns"]
            self._finished_returns = host["run"]["finished_returns"]
            self.evaluation = host["run"]["evaluation"]
            obs = envs.set_state(host["envs"])
            if not envs.resumes_episodes:
                self._succeeded[:], self._returns[:] = False, 0
            # Until W&B has been started --resume may be refused, and then has changed nothing.
            self._logger = Logger(self.dir, self.config, self.args, resume_from=self.env_steps)
            policies.drop_after(self.dir, self.env_steps)
            store_config(self.dir, self.config)  # by which grids and tools go
            self._logger.say(f"resumed at {self.env_steps:,} steps")
            if not envs.resumes_episodes:
                self._logger.say(f"note: episodes begin anew: the state of {self.args.env_id} "
                                 f"({envs.engine}) cannot be saved")
        else:
            obs = envs.observations()
            self.save(state, buffers, envs)  # so that a run that dies early can be resumed too
        state, buffers = jax.device_put((state, buffers), jax.devices()[0])
        return state, buffers, obs

    def iterations(self) -> Iterator[int]:
        """The environment steps done before each iteration, up to the run's end."""
        iteration = self.args.steps_per_iteration
        for env_steps in range(self.env_steps, self.args.total_timesteps, iteration):
            if self._pending is not None:
                self._play_on(self._steps_each_time)
            self.env_steps = env_steps + iteration
            yield env_steps

    def save(self, state: Any, buffers: Any, envs: Any) -> None:
        """Write a checkpoint; see `common.checkpoint.save`. A run that was told to stop ends here.

        Args:
            state, buffers, envs: as for `begin`; all steps of this iteration are in `buffers`.

        Raises:
            UserError: a network is not finite; the checkpoint before stays the newest.
            SystemExit: 128 + the signal's number, as shells count it: 130 for Ctrl-C.
        """
        for path, leaf in jax.tree.leaves_with_path(state):
            if not np.isfinite(leaf).all():
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise self._diverged(name, "not finite")
        self._finish_evaluation()
        mine = {"succeeded": self._succeeded, "finished": self._finished, "returns": self._returns,
                "finished_returns": self._finished_returns, "evaluation": self.evaluation}
        host = {"envs": envs.get_state(), "run": mine}
        checkpoint.save(self.dir, self.env_steps, state, buffers._asdict(), host)
        if self._stopped_by is not None and self.env_steps < self.args.total_timesteps:
            self.logger.say(f"saved at {self.env_steps:,} steps; continue with --resume "
                            f"{shlex.quote(str(self.dir))}")
            self.close(finished=False)
            raise SystemExit(128 + self._stopped_by)

    def must_save(self) -> bool:
        """True when a checkpoint is due, and when the run has been told to stop."""
        return self._stopped_by is not None or self.is_due(self.args.checkpoint_every)

    def is_due(self, every: int) -> bool:
        """True when this iteration has passed a multiple of `every`, and at the run's end."""
        if self.env_steps == self.args.total_timesteps:
            return True
        before = self.env_steps - self.args.steps_per_iteration
        return every > 0 and self.env_steps // every > before // every

    def video_path(self) -> Path | None:
        """Where to write the video of an evaluation now; None without --capture-video."""
        path = self.dir / VIDEOS / f"{self.env_steps:08d}.mp4"
        return path if self.args.capture_video else None

    def count_episodes(self, step: Step) -> None:
        """Note success and reward of the running episodes, and which of them have ended."""
        self._succeeded = self._succeeded | step.success
        self._returns = self._returns + step.reward
        self._finished += self._succeeded[step.ended].tolist()
        self._finished_returns += self._returns[step.ended].tolist()
        self._succeeded = self._succeeded & ~step.ended
        self._returns = np.where(step.ended, 0, self._returns)

    def evaluate(self, policy: Callable[[Any, jax.Array], jax.Array], state: Any) -> None:
        """Evaluate `policy(state, obs)`, as it is now, while training goes on, and keep it.

        The episodes are played on in each of the following iterations, and have ended before the
        next evaluation begins and before a checkpoint is saved. So the rows of an evaluation come
        after those of training steps that were done meanwhile.
        """
        self._finish_evaluation()
        iterations = max(1, self.args.eval_every // self.args.steps_per_iteration)
        # `_pending` is asked once more than the evaluation has steps. Rounded up, so that it ends
        # before the next one is due.
        self._steps_each_time = -(-(self._evaluator.steps + 1) // iterations)
        state = copy_arrays(state)  # because an update takes its memory for the next one
        self._pending = self._evaluation(policy, state, self.env_steps, self.video_path())

    def _evaluation(
        self, policy: Callable, state: Any, env_steps: int, video_path: Path | None
    ) -> Generator[None, None, None]:
        """Play an evaluation, then write its rows, its video and its policy."""
        def act(obs: np.ndarray) -> jax.Array:
            if not self._policy_names:
                self._policy_names = policies.names_used(policy, state, obs)
            return policy(state, obs)

        evaluation = yield from self._evaluator.play(act)
        self.evaluation = {key: float(value) for key, value in evaluation.items()}
        self.logger.log(env_steps, self.evaluation)
        if video_path is not None:
            try:
                write_video(video_path, self._evaluator.pictures)
                self.logger.log_video(env_steps, video_path)
            except UserError as error:  # training goes on without
                self.logger.say(f"warning: {error}")
        arrays = policies.named_arrays(state)
        arrays = {name: arrays[name] for name in self._policy_names}
        policies.save(self.dir, env_steps, arrays, self.args.eval_every)
        self._pending = None

    def _play_on(self, steps: int | None) -> None:
        """Play `steps` more of the evaluation that has begun; None: all that is left."""
        for _ in islice(self._pending, steps):
            pass

    def _finish_evaluation(self) -> None:
        if self._pending is not None:
            self._play_on(None)

    def log_training(self, phase: str, metrics: dict[str, Any]) -> None:
        """Write a row of metrics and refresh the live line.

        Raises:
            UserError: a metric is not finite: the run has diverged.
        """
        if self.env_steps == self.args.total_timesteps:
            self._finish_evaluation()  # the last line shows it
        row = {key: float(value) for key, value in jax.device_get(metrics).items()}
        bad = first_not_finite(row)
        if bad is not None:
            raise self._diverged(bad, row[bad])
        if self._finished:
            row["charts/success_once"] = float(np.mean(self._finished))
            if self._shows_returns:
                row["charts/return"] = float(np.mean(self._finished_returns))
        row["time/steps_per_second"] = self.logger.speed(self.env_steps)
        self._finished, self._finished_returns = [], []
        self.logger.log(self.env_steps, row)
        if self._shows_returns:
            name, style, trained, evaluated = "return", ".1f", "charts/return", "eval/return"
        else:  # in training success at any step counts, in evaluation that at the last
            name, style = "success", ".0%"
            trained, evaluated = "charts/success_once", "eval/success_at_end"
        values = row.get(trained), self.evaluation.get(evaluated)
        trained, evaluated = ("-" if x is None else f"{x:{style}}" for x in values)
        self.logger.live(self.env_steps, **{
            "steps/s": f"{row['time/steps_per_second']:.0f}",
            f"{name}: train": trained, "eval": evaluated, "phase": phase,
        })

    def check_finite(self, action: np.ndarray, metrics: dict[str, Any]) -> None:
        """Stop a diverged run before environments get its actions; costs no look at the device.

        Args:
            action: [num_envs, action_dim], on the host.
            metrics: of the last updates, which then tell what has diverged.

        Raises:
            UserError: an action is not finite.
        """
        if np.isfinite(action).all():
            return
        values = jax.device_get(metrics)
        bad = first_not_finite(values)
        raise self._diverged(bad or "an action", values.get(bad, "not finite"))

    def _diverged(self, what: str, value: Any) -> UserError:
        self.close(finished=False)
        return UserError(f"{what} is {value} at step {self.env_steps}: the run has diverged; its "
                         f"last checkpoint before that is in {self.dir}")

    def close(self, finished: bool = True) -> None:
        """End the records and the environments.

        `finished`: the last evaluation is that of the final policy. Else one that has not ended is
        left out.
        """
        if finished:
            self._finish_evaluation()
        while self._handlers:
            signal.signal(*self._handlers.popitem())
        if finished and self.evaluation:
            measured = (
                f"return {self.evaluation['eval/return']:.1f}" if self._shows_returns else
                f"success_once {self.evaluation['eval/success_once']:.0%}, "
                f"success_at_end {self.evaluation['eval/success_at_end']:.0%}"
            )
            self.logger.say(f"final policy: {measured}; run folder: {self.dir}")
        if finished and self.args.drop_replay:
            checkpoint.drop_replay(self.dir)
        self.logger.close(finished)
        unlock_run_dir(self.dir)
        for envs in self._environments:
            envs.close()


def start_run(
    args: Any, buffers: Any, sizes: Sizes, envs: Any, evaluate: Evaluator, *,
    vlm: VLM | None = None, view: View | None = None, **facts: Any,
) -> Run:
    """Claim a run folder and write its config.json; with --resume, open the existing one.

    The script's name is that of the file that defines `args`; the folder keeps a copy of it.

    Args:
        args: the script's arguments.
        buffers: its rings, a NamedTuple, for the check that the disk can hold their checkpoints.
        sizes: what its networks are made for.
        envs, evaluate: its environments and its Evaluator, which the run closes.
        vlm, view: its VLM, if any, and what that is shown of a scene.
        facts: what else belongs into config.json, e.g. the prompt.

    Raises:
        UserError: the folder cannot be used, the disk is too small for the run's checkpoints, or
            the resumed run's VLM was another one.
    """
    source = source_file(type(args))
    here = {"engine": envs.engine, "jax_devices": [str(device) for device in jax.devices()]}
    if vlm is not None:
        here["vlm_id"] = vlm.id
    if envs.draws:
        here["gl"] = gl_info()
    if args.resume:
        run_dir = Path(args.resume)
        config = read_config(run_dir)
        if vlm is not None:
            check_same_vlm(run_dir, config, vlm)
        run = Run(args, run_dir, config, envs, evaluate, here)
        kept = source and run_dir / source.name
        if kept and kept.exists() and kept.read_bytes() != source.read_bytes():
            show(f"note: {source.name} has changed since this run began; {kept} is what it was")
        return run
    checkpoint.check_space(
        Path(args.run_dir or "runs"), buffers._asdict(), args.total_timesteps
    )
    script = script_name(type(args))
    facts |= here
    if vlm is not None:
        facts["vlm"] = vlm.settings
    if view is not None:
        facts["view"] = view._asdict()
    run_dir = create_run_dir(args.run_dir, args.env_id, script, args.seed)
    config = write_config(
        run_dir, args, source, script=script, sizes=sizes._asdict(), evaluation=evaluate.settings,
        **facts
    )
    if source and source != (run_dir / source.name).resolve():
        shutil.copy(source, run_dir / source.name)
    run = Run(args, run_dir, config, envs, evaluate)
    run.logger.say(f"run folder: {run_dir}")
    for key, value in facts.items():
        run.logger.say(f"  {key}: {value}")
    return run
