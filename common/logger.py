"""The run folder's records: config.json, metrics.csv, TensorBoard events, W&B, one live line."""

import csv
import dataclasses
import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from common.cores import num_cores
from common.errors import UserError
from common.names import file_name

CSV_HEADER = ("env_steps", "key", "value")
OF_ANOTHER_REPOSITORY = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY",
                         "GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_PREFIX"}
PACKAGES = ("metaworld", "mujoco", "gymnasium", "jax", "jaxlib", "flax", "optax", "torch", "numpy")


_LOCKS: dict[Path, TextIO] = {}  # the run folders that this process writes to


def check_run_dir(run_dir: str | None) -> None:
    """Refuse a run folder that cannot be used, before anything is built; nothing is written.

    Raises:
        UserError: it cannot be written, is in use, or already holds a run.
    """
    path = Path(run_dir or "runs")
    try:
        if run_dir and (path.resolve() in _LOCKS or holds_run(path)):
            raise UserError(f"{path} already holds a run: continue it with --resume "
                            f"{shlex.quote(str(path))}, or choose another --run-dir")
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise UserError(f"{path} is not a free folder: choose another --run-dir")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the run folder {path}: {reason}; choose another "
                        "--run-dir") from error


def create_run_dir(run_dir: str | None, env_id: str, script: str, seed: int) -> Path:
    """Make and lock the run folder: `runs/<env>__<script>__<seed>__<time>` by default, numbered
    where another run has begun in the same second.

    A folder whose run died before its first checkpoint may be used again.

    Raises:
        UserError: it cannot be written, is in use, or already holds a run.
    """
    check_run_dir(run_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{file_name(env_id)}__{script}__{seed}__{stamp}"
    path = Path(run_dir) if run_dir else Path("runs") / name
    try:
        if run_dir:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path = make_free_folder(path)
        lock_run_dir(path)
        if not (path / "config.json").exists():
            with open(path / "config.json", "x"):  # decides where a file system has no locks
                pass
    except FileExistsError:
        raise UserError(f"{path} is not a free folder: choose another --run-dir") from None
    except OSError as error:
        raise UserError(f"cannot write the run folder {path}: {error.strerror}; choose another "
                        "--run-dir") from error
    return path


def make_free_folder(path: Path) -> Path:
    """Make the folder `path`, or the first of `path`-2, `path`-3 ... that is not there."""
    for number in itertools.count(1):
        free = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            free.mkdir(parents=True)
            return free
        except FileExistsError:
            if not free.is_dir():  # a file above it
                raise
    raise AssertionError("unreachable")


def holds_run(path: Path) -> bool:
    """Whether there is anything in a run folder that a new run would destroy."""
    metrics = path / "metrics.csv"
    return (path / "config.json").exists() and (
        any((path / "checkpoints").glob("step_*"))
        or (metrics.exists() and len(metrics.read_bytes().splitlines()) > 1)
    )


def lock_run_dir(path: Path) -> None:
    """Keep other processes from writing into a run folder, until `unlock_run_dir` or this
    process's end, however it comes.

    Raises:
        UserError: another process holds it.
    """
    if path.resolve() in _LOCKS:
        return
    file = open(path / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{path} is in use by another process: wait for it or stop it, or "
                        "choose another --run-dir") from None
    except OSError:  # a file system without locks is no reason to stop
        pass
    _LOCKS[path.resolve()] = file


def unlock_run_dir(path: Path) -> None:
    """Let others write there again."""
    if file := _LOCKS.pop(path.resolve(), None):
        file.close()


def git_commit() -> str:
    """The checked-out commit, with '+dirty' when tracked files differ; 'unknown' outside git."""
    # GIT_DIR and the like, which a hook of another repository sets, would name that one's commit.
    environment = {key: x for key, x in os.environ.items() if key not in OF_ANOTHER_REPOSITORY}

    def git(*args: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *args], cwd=folder, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Installed version of each package that a result can depend on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def write_config(run_dir: Path, args: Any, **facts: Any) -> dict[str, Any]:
    """Write `config.json`: the arguments and the facts that a reader needs to trust the run."""
    config = {
        "args": dataclasses.asdict(args),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "run_id": secrets.token_hex(4),  # of W&B: folders' names are not unique
        "commit": git_commit(),
        "versions": versions(),
        "cpu_count": os.cpu_count(),
        "num_cores": num_cores(),
        **facts,
    }
    _write_json(run_dir / "config.json", config)
    return config


def store_total(run_dir: Path, config: dict[str, Any], total_timesteps: int) -> None:
    """Note in `config`, and in `config.json`, that a run is continued up to so many steps."""
    if config["args"].get("total_timesteps") != total_timesteps:
        config["args"]["total_timesteps"] = total_timesteps
        _write_json(run_dir / "config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
    temporary.replace(path)


def read_config(run_dir: Path, name: str | None = None) -> dict[str, Any]:
    """The configuration of the run in `run_dir`; `name`: what an error calls the folder.

    Raises:
        UserError: there is no run in that folder, or its config.json cannot be read.
    """
    name = name or f"--resume {run_dir}"
    if not run_dir.is_dir():
        raise UserError(f"{name}: no such folder; give a run folder under runs/")
    try:
        config = json.loads((run_dir / "config.json").read_text())
        kinds = {"env_id": str, "seed": int, "total_timesteps": int}
        for key, kind in kinds.items():  # what all that read it look at
            value = config["args"].get(key, kind())
            if not isinstance(value, kind):
                raise TypeError(f"its {key} is {value!r}")
        config["args"]["env_id"]
        return config
    except FileNotFoundError:
        raise UserError(f"{name}: not a run folder (it has no config.json)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: its config.json cannot be read ({reason})") from None


class Logger:
    """Writes scalars to metrics.csv and TensorBoard, and to W&B when asked.

    Args:
        run_dir: the run folder.
        config: what `write_config` returned.
        track: send to W&B as well (offline without a login: set WANDB_MODE=offline).
        project, entity: the W&B project, and whose it is (None: the user's own).
        total_timesteps: for the live line's ETA.
        resume_from: drop rows with a larger `env_steps` that a killed run left behind.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        *,
        track: bool,
        project: str,
        entity: str | None = None,
        total_timesteps: int,
        resume_from: int | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir, self.total_timesteps = run_dir, total_timesteps
        path = run_dir / "metrics.csv"
        if resume_from is not None and path.exists():
            keep_rows_until(path, resume_from)
        self._file: TextIO = open(path, "a", newline="")
        self._csv = csv.writer(self._file, lineterminator="\n")
        if path.stat().st_size == 0:
            self._csv.writerow(CSV_HEADER)
        purge = None if resume_from is None else resume_from + 1
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        self._wandb = start_wandb(run_dir, config, project, entity) if track else None
        self._last_time, self._last_steps = time.monotonic(), resume_from or 0
        self._seconds_per_step: float | None = None  # lately: phases differ a lot in speed
        self._line_width = 0

    def log(self, env_steps: int, metrics: dict[str, float]) -> None:
        """Write each metric as one row (env_steps, key, value). Values are Python or 0-d floats."""
        for key, value in metrics.items():
            self._csv.writerow((env_steps, key, format(float(value), ".8g")))
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

    def close(self) -> None:
        if self._line_width:
            show()
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def show(text: str = "", end: str = "\n") -> None:
    """Print; if nobody reads any more (a closed terminal, a dead `tee`), the run goes on."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def keep_rows_until(path: Path, env_steps: int) -> None:
    """Drop the rows of metrics.csv beyond `env_steps`, and a last line that was cut off."""
    text = path.read_text(errors="replace")  # a machine that lost power may leave anything there
    rows = [line.split(",") for line in text[: text.rfind("\n") + 1].split("\n")]
    kept = [r for r in rows[1:] if len(r) == 3 and is_row(r) and int(r[0]) <= env_steps]
    temporary = path.with_suffix(".csv.tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([CSV_HEADER, *kept])
    temporary.replace(path)


def is_row(fields: list[str]) -> bool:
    """Whether the three fields of a line of metrics.csv are (env_steps, key, value)."""
    env_steps, key, value = fields
    try:
        float(value)
    except ValueError:
        return False
    return env_steps.isascii() and env_steps.isdecimal() and key.isprintable()


def format_duration(seconds: float) -> str:
    """'1h02m', '3m20s' or '12s'."""
    seconds = round(max(seconds, 0))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def first_not_finite(metrics: dict[str, Any]) -> str | None:
    """The name of the first metric that is NaN or infinite, if any."""
    return next((k for k, v in metrics.items() if not math.isfinite(np.asarray(v).item())), None)


def start_wandb(run_dir: Path, config: dict[str, Any], project: str, entity: str | None):
    """A W&B run with the configuration; the same id on --resume, so that its curve continues.

    The arguments are flat and the script is `exp_name`, as in CleanRL's runs; what else config.json
    holds is below `facts`. The script is kept as W&B's code of the run.
    """
    facts = {key: value for key, value in config.items() if key not in ("args", "script")}
    try:
        import wandb

        run = wandb.init(
            entity=entity, project=project, name=run_dir.name, id=config["run_id"],
            resume="allow", dir=str(run_dir), save_code=True,
            config={"exp_name": config["script"], **config["args"], "facts": facts},
        )
    except ImportError:
        raise UserError("--track needs the wandb package: pip install wandb") from None
    except Exception as error:  # wandb's own errors share no base class worth naming
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"--track: W&B could not start ({first_line}); log in with 'wandb login', or set "
            "WANDB_MODE=offline"
        ) from error
    run.define_metric("*", step_metric="env_steps")
    return run
