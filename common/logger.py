"""What a run records while it trains: metrics.csv, TensorBoard events, W&B, and one live line."""

import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from common.errors import UserError, first_line
from common.flags import RunArgs
from common.run_folder import (
    METRICS,
    METRICS_HEADER,
    TENSORBOARD,
    keep_metrics_until,
    metrics_line,
)


class Logger:
    """Writes scalars to metrics.csv and TensorBoard, and to W&B when asked.

    Args:
        run_dir: the run folder.
        config: what `run_folder.write_config` returned.
        args: the script's: how many steps there will be, and whether and where W&B gets them too.
        resume_from: drop rows with a larger `env_steps` that a killed run left behind.
    """

    def __init__(
        self, run_dir: Path, config: dict[str, Any], args: RunArgs, resume_from: int | None = None
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.total_timesteps = args.total_timesteps
        # First, as it may be refused, and a refused --resume drops no rows.
        self._wandb = start_wandb(run_dir, config, args) if args.track else None
        if resume_from is not None:
            keep_metrics_until(run_dir, resume_from)
        self._file: TextIO = open(run_dir / METRICS, "a", newline="")
        if self._file.tell() == 0:
            self._file.write(METRICS_HEADER)
        purge = None if resume_from is None else resume_from + 1
        self._tensorboard = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=purge)
        self._last_time, self._last_steps = time.monotonic(), resume_from or 0
        self._seconds_per_step: float | None = None  # lately: phases differ a lot in speed
        self._line_width = 0

    def log(self, env_steps: int, metrics: dict[str, float]) -> None:
        """Write each metric as one row (env_steps, key, value). Values are Python or 0-d floats."""
        for key, value in metrics.items():
            self._file.write(metrics_line(env_steps, key, value))
            self._tensorboard.add_scalar(key, float(value), env_steps)
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({"env_steps": env_steps, **{k: float(v) for k, v in metrics.items()}})

    def log_video(self, env_steps: int, path: Path | None) -> None:
        """Send an evaluation's video to W&B, if there is one."""
        if self._wandb is not None and path is not None and path.exists():
            import wandb

            video = wandb.Video(str(path), format="mp4")
            self._wandb.log({"env_steps": env_steps, "videos/evaluation": video})

    def speed(self, env_steps: int) -> float:
        """Environment steps per second since the last call."""
        now = time.monotonic()
        rate = (env_steps - self._last_steps) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_steps = now, env_steps
        newest = 1 / max(rate, 1e-9)
        before = newest if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = 0.7 * before + 0.3 * newest
        return rate

    def live(self, env_steps: int, **fields: Any) -> None:
        """One line that overwrites itself on a terminal; one line per call when piped to a file.

        The time left is by the speed of late, as `speed` has measured it.
        """
        done = [f"{env_steps:>9,}/{self.total_timesteps:,}"]
        shown, left = [f"{key} {value}" for key, value in fields.items()], []
        if self._seconds_per_step is not None:
            remaining = (self.total_timesteps - env_steps) * self._seconds_per_step
            left = [f"ETA {format_duration(remaining)}"]
        line = " | ".join(done + shown + left)
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            if len(line) > width:  # what is cut off then is not the time left
                line = " | ".join(done + left + shown)[:width]
            show("\r" + line.ljust(self._line_width), end="")
            self._line_width = len(line)
        else:
            show(line)

    def say(self, text: str) -> None:
        """A line of its own, which the live line does not overwrite."""
        if self._line_width:
            show()
            self._line_width = 0
        show(text)

    def close(self, finished: bool = True) -> None:
        """End the records. W&B calls a run that is not `finished` failed."""
        if self._line_width:
            show()
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if finished else 1)


def show(text: str = "", end: str = "\n") -> None:
    """Print; if nobody reads any more (a closed terminal, a dead `tee`), the run goes on."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def format_duration(seconds: float) -> str:
    """'1h02m', '3m20s' or '12s'."""
    seconds = round(max(seconds, 0))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def first_not_finite(metrics: dict[str, Any]) -> str | None:
    """The name of the first metric that is NaN or infinite, if any."""
    return next((k for k, v in metrics.items() if not math.isfinite(np.asarray(v).item())), None)


def start_wandb(run_dir: Path, config: dict[str, Any], args: RunArgs):
    """A W&B run with the configuration; the same id on --resume, so that its curve continues.

    The arguments are flat and the script is `exp_name`, as in CleanRL's runs; what else config.json
    holds is below `facts`. The script is kept as W&B's code of the run.
    """
    facts = {key: value for key, value in config.items() if key not in ("args", "script")}
    # A grid's folders are <method>/<task>/<seed>: a seed alone would be no name.
    name = "/".join(run_dir.parts[-3:]) if run_dir.name.isdecimal() else run_dir.name
    import wandb

    try:
        run = wandb.init(
            entity=args.wandb_entity, project=args.wandb_project, name=name,
            id=config["run_id"], resume="allow", dir=str(run_dir), save_code=True,
            config={"exp_name": config["script"], **config["args"], "facts": facts},
        )
    except Exception as error:  # wandb's own errors share no base class worth naming
        raise UserError(
            f"--track: W&B could not start ({first_line(error)}); log in with 'wandb login', or "
            "set WANDB_MODE=offline"
        ) from error
    run.define_metric("*", step_metric="env_steps")
    return run
