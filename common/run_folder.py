"""The run folder: what is where in it, who may write to it, its settings, and how far its run is.

    config.json     what the run was started with: arguments, versions, engine, VLM, commit; and
                    where it was continued with another of these
    <script>.py     the script as it was then
    metrics.csv     env_steps,key,value
    lock            held by the process that writes to the folder
    tensorboard/    checkpoints/    policies/    videos/    evaluations/ (of tools.evaluate)

All else has these names from here. It is imported by programs that look after many runs, and so
loads neither JAX nor torch.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from common.cores import num_cores
from common.errors import UserError
from common.names import file_name
from common.system import is_locked
from common.versions import git_commit, versions

CONFIG, METRICS, LOCK = "config.json", "metrics.csv", "lock"
CHECKPOINTS, POLICIES = "checkpoints", "policies"
TENSORBOARD, VIDEOS = "tensorboard", "videos"
METRICS_HEADER = "env_steps,key,value\n"
TAIL_BYTES = 65_536  # of metrics.csv: what was logged the last 80 times or so

_LOCKS: dict[Path, TextIO] = {}  # the run folders that this process writes to


# ------------------------------------------------------------------- a new run, and its lock


def check_run_dir(run_dir: str | None) -> None:
    """Refuse a run folder that cannot be used, before anything is built; nothing is written.

    Raises:
        UserError: it cannot be written, is in use, or already holds a run.
    """
    path = Path(run_dir or "runs")
    with _writing(path):
        if run_dir and (path.resolve() in _LOCKS or holds_run(path)):
            raise UserError(f"{path} already holds a run: continue it with --resume "
                            f"{shlex.quote(str(path))}, or choose another --run-dir")
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise FileExistsError
        tempfile.TemporaryFile(dir=existing).close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Whatever prevents the block from writing a run folder becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except FileExistsError:
        raise UserError(f"{path} is not a free folder: choose another --run-dir") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
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
    name = f"{file_name(env_id)}__{script}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(run_dir or Path("runs") / name)
    with _writing(path):
        if run_dir:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path = make_free_folder(path)
        lock_run_dir(path)
        if not (path / CONFIG).exists():
            open(path / CONFIG, "x").close()  # decides where a file system has no locks
    return path


def make_free_folder(path: Path) -> Path:
    """Make the folder `path`, or the first of `path`-2, `path`-3 ... that is not there."""
    free, number = path, 1
    while True:
        try:  # not looked for before: another process may be about to make it
            free.mkdir(parents=True)
            return free
        except FileExistsError:
            if not free.is_dir():  # a file above it
                raise
        number += 1
        free = path.with_name(f"{path.name}-{number}")


def holds_run(path: Path) -> bool:
    """Whether there is anything in a folder that a new run would destroy or be taken for."""
    return path.is_dir() and bool(
        checkpoints(path) or kept_policies(path) or any(read_metrics(path)))


def lock_run_dir(path: Path) -> None:
    """Keep other processes from writing into a run folder, until `unlock_run_dir` or this
    process's end, however it comes.

    Raises:
        UserError: another process holds it.
    """
    if path.resolve() in _LOCKS:
        return
    lock = take_lock(path / LOCK)
    if lock is None:
        raise UserError(f"{path} is in use by another process: wait for it or stop it, or "
                        "choose another --run-dir")
    _LOCKS[path.resolve()] = lock


def unlock_run_dir(path: Path) -> None:
    """Let others write there again."""
    if file := _LOCKS.pop(path.resolve(), None):
        file.close()


def take_lock(path: Path) -> TextIO | None:
    """The file `path`, open and locked until it is closed; None: another process holds it."""
    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:  # a file system without locks is no reason to stop
        pass
    return file


def is_in_use(run_dir: Path) -> bool:
    """Whether a process holds the run folder's lock; the lock is asked, not taken."""
    try:
        with open(run_dir / LOCK, "r+") as file:
            return is_locked(file)
    except OSError:  # no such file, or a file system without locks
        return False


# ------------------------------------------------------------------------------ config.json


def write_config(
    run_dir: Path, args: Any, source: Path | None = None, **facts: Any
) -> dict[str, Any]:
    """Write `config.json`: the arguments and the facts that a reader needs to trust the run.

    `source` is the script's file.
    """
    config = {
        "args": dataclasses.asdict(args),
        "command": _command(),
        "run_id": secrets.token_hex(4),  # of W&B: folders' names are not unique
        **_made_by(source),
        **facts,
    }
    store_config(run_dir, config)
    return config


def _made_by(source: Path | None) -> dict[str, Any]:
    """The code and the machine."""
    facts = {"commit": git_commit(), "versions": versions(), "cpu_count": os.cpu_count(),
             "num_cores": num_cores()}
    if source:  # the commit does not tell two versions of a copy apart that git does not track
        facts["script_sha256"] = _digest(source)
    return facts


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def note_continuation(
    config: dict[str, Any], run_dir: Path, args: Any, env_steps: int, source: Path | None,
    facts: dict[str, Any],
) -> None:
    """Note in `config` that a run goes on after `env_steps`: up to where, and below `continued`
    which code, machine or other of `facts` is another one than before. `store_config` writes it.

    `args` are the script's arguments, `source` is its file.
    """
    if config["args"].get("total_timesteps") != args.total_timesteps:
        config["args"]["total_timesteps"] = args.total_timesteps
        config["command"] = f"{config['command']} && {_command()}"
    kept = source and run_dir / source.name
    if kept and kept.exists():
        config.setdefault("script_sha256", _digest(kept))  # older runs have none
    # What was done beyond these steps, after an earlier continuation, is lost.
    continued = [x for x in config.pop("continued", []) if x["env_steps"] < env_steps]
    before = dict(config)
    for earlier in continued:
        before |= earlier
    now = _made_by(source) | facts
    changes = {key: value for key, value in now.items() if before.get(key) != value}
    if changes and env_steps < args.total_timesteps:
        continued.append({"env_steps": env_steps, **changes})
    if continued:
        config["continued"] = continued


def store_config(run_dir: Path, config: dict[str, Any]) -> None:
    write_file(run_dir / CONFIG, (json.dumps(config, indent=2, default=str) + "\n").encode())


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write `path`, flushed to the disk; its earlier content stays until the new one is complete.

    Raises:
        OSError: the disk is full or read-only.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_config(run_dir: Path, name: str | None = None) -> dict[str, Any]:
    """The configuration of the run in `run_dir`; `name`: what an error calls the folder.

    Raises:
        UserError: there is no run in that folder, or its config.json cannot be read.
    """
    name = name or f"--resume {run_dir}"
    if not run_dir.is_dir():
        raise UserError(f"{name}: no such folder; give a run folder under runs/")
    try:
        config = json.loads((run_dir / CONFIG).read_text())
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


# ------------------------------------------------------------------------------ metrics.csv


class Metrics(NamedTuple):
    """What metrics.csv holds."""

    rows: list[tuple[int, str, float]]  # (env_steps, key, value), in the order of the file
    unreadable: int = 0  # lines: a machine that lost power may leave anything there


def read_metrics(run_dir: Path, last_bytes: int | None = None) -> Metrics:
    """The rows of a run, none where there is no file yet.

    Args:
        run_dir: the run folder.
        last_bytes: read only so much of the file, from its end.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with open(run_dir / METRICS, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(last_bytes or size, size), os.SEEK_END)
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return Metrics([])
    # The first is the header, or was cut; the last is empty, or is just being written.
    lines = [line.rstrip("\r") for line in lines[1:-1] if line.strip()]
    rows = [row for row in map(_row, lines) if row is not None]
    return Metrics(rows, len(lines) - len(rows))


def _row(line: str) -> tuple[int, str, float] | None:
    try:
        env_steps, key, value = line.split(",")
        if env_steps.isascii() and env_steps.isdecimal() and key.isprintable():
            return int(env_steps), key, float(value)
    except ValueError:
        pass
    return None


def metrics_line(env_steps: int, key: str, value: float) -> str:
    return f"{env_steps},{key},{float(value):.8g}\n"


def keep_metrics_until(run_dir: Path, env_steps: int) -> None:
    """Drop the rows beyond `env_steps`, and what cannot be read."""
    kept = [metrics_line(*row) for row in read_metrics(run_dir).rows if row[0] <= env_steps]
    write_file(run_dir / METRICS, (METRICS_HEADER + "".join(kept)).encode())


# --------------------------------------------------------------------------------- progress


@dataclass(frozen=True)
class Progress:
    """What a run folder tells of a run; None where it says nothing yet."""

    steps: int = 0
    total: int | None = None
    speed: float | None = None  # steps a second, lately
    success: float | None = None  # eval/success_at_end of the last evaluation
    mean_return: float | None = None  # its eval/return

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.steps) / self.speed if self.total and self.speed else None


def checkpoint_folder(run_dir: Path, env_steps: int) -> Path:
    return run_dir / CHECKPOINTS / f"step_{env_steps:010d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest first; not copies with another name."""
    return sorted((run_dir / CHECKPOINTS).glob("step_" + "[0-9]" * 10), reverse=True)


def steps_of(checkpoint: Path) -> int:
    """Environment steps done when a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step_"))


def policy_file(run_dir: Path, env_steps: int) -> Path:
    return run_dir / POLICIES / f"{env_steps:010d}.npz"


def kept_policies(run_dir: Path) -> dict[int, Path]:
    """The files of the policies that a run has kept, by their environment steps, ascending."""
    found = sorted((run_dir / POLICIES).glob("[0-9]" * 10 + ".npz"))
    return {int(path.stem): path for path in found}


def saved_steps(run_dir: Path) -> int | None:
    """Environment steps of a run's newest checkpoint, if it has any."""
    return max(map(steps_of, checkpoints(run_dir)), default=None)


def planned_steps(run_dir: Path) -> int | None:
    """The run's --total-timesteps, in whole iterations as config.json has it."""
    try:
        return read_config(run_dir)["args"].get("total_timesteps")
    except UserError:
        return None


def is_finished(run_dir: Path) -> bool:
    saved = saved_steps(run_dir)
    return saved is not None and saved == planned_steps(run_dir)


def read_progress(run_dir: Path) -> Progress:
    """How far a run is, by the end of its metrics.csv and its checkpoints."""
    try:
        rows = read_metrics(run_dir, TAIL_BYTES).rows
    except OSError:
        rows = []
    values = {key: value for _, key, value in rows}
    steps = max((row[0] for row in rows), default=0)
    return Progress(max(steps, saved_steps(run_dir) or 0), planned_steps(run_dir),
                    values.get("time/steps_per_second"), values.get("eval/success_at_end"),
                    values.get("eval/return"))
