"""The command line that all scripts share: flags from a dataclass, and --resume."""

import dataclasses
import errno
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from common.cores import share_cores
from common.envs import MAX_EPISODE_STEPS, WorkerError
from common.errors import UserError
from common.logger import read_config
from common.tasks import resolve_env_id

ArgsT = TypeVar("ArgsT")

# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = {"resume", "total_timesteps", "eval_every", "checkpoint_every", "log_every", "track",
              "wandb_project", "capture_video"}
MAY_BE_ZERO = {"seed", "eval_episodes", "checkpoint_every", "camera_id", "learning_starts", "rho",
               "reward_margin", "l2_margin", "relay_until", "alpha"}
LARGEST = 2**31 - 1  # counters on the device are int32
DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.EFBIG}


def parse_args(args_type: type[ArgsT], argv: list[str]) -> ArgsT:
    """Parse `argv` into the script's frozen dataclass.

    With `--resume FOLDER` the stored run's arguments are the defaults, and only bookkeeping flags
    and `--total-timesteps` may be given other values.

    Raises:
        UserError: the folder holds no run of this script, or a flag may not change.
    """
    folder = resumed_folder(argv)
    if folder is None:
        return tyro.cli(args_type, args=argv)
    default = stored_args(read_config(Path(folder))["args"], args_type, f"--resume {folder}")
    names = {f.name for f in dataclasses.fields(args_type)}
    args = tyro.cli(args_type, args=argv, default=default)
    args = dataclasses.replace(args, env_id=resolve_env_id(args.env_id))
    for name in sorted(names - MAY_CHANGE):
        if getattr(args, name) != getattr(default, name):
            raise UserError(f"--{name.replace('_', '-')} cannot change in a resumed run: it is "
                            f"{getattr(default, name)}, not {getattr(args, name)}")
    return args


def stored_args(stored: dict[str, Any], args_type: type[ArgsT], name: str) -> ArgsT:
    """The arguments in a run's config.json as the script's dataclass.

    Raises:
        UserError: they are not this script's or version's; `name` is what it calls the run.
    """
    names = {f.name for f in dataclasses.fields(args_type)}
    if set(stored) != names:
        odd = sorted(set(stored) ^ names)[0]
        raise UserError(f"{name}: that run is another script's or version's (its arguments differ "
                        f"in {odd})")
    return args_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})


def check_args(args: ArgsT) -> ArgsT:
    """`args` with the task's full name.

    Raises:
        UserError: names the first flag whose value cannot work, and what can.
    """
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, tuple) and (not value or min(value) < 1 or max(value) > LARGEST):
            raise UserError(f"{flag} must be whole numbers from 1 to {LARGEST}, not {value}")
        if isinstance(value, int) and value > LARGEST:
            raise UserError(f"{flag} must be at most {LARGEST}, not {value}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value < 0:
            raise UserError(f"{flag} must be a finite number, not negative, but is {value}")
        if value == 0 and field.name not in MAY_BE_ZERO:
            raise UserError(f"{flag} must be positive, not {value}")
        if value > 1 and field.name in {"gamma", "tau", "alpha"}:
            raise UserError(f"{flag} must be at most 1, not {value}")
    updates = args.utd * args.num_envs
    if not 1 <= updates <= LARGEST or abs(updates - round(updates)) > 1e-6:
        raise UserError(f"--utd {args.utd:g} x --num-envs {args.num_envs} gives {updates:g} "
                        f"updates per iteration: it must be a whole number from 1 to {LARGEST}")
    if args.total_timesteps % steps_per_iteration(args):
        raise UserError(f"--total-timesteps {args.total_timesteps} is no multiple of the "
                        f"{steps_per_iteration(args)} steps of an iteration (--num-envs"
                        f"{' x --action-repeat' if hasattr(args, 'action_repeat') else ''})")
    least, why = args.num_envs, "one step"
    if hasattr(args, "embedding_buffer_size"):
        # An episode is copied from one ring to the other at once: both must hold it.
        if args.embedding_buffer_size < MAX_EPISODE_STEPS:
            raise UserError("--embedding-buffer-size must be an episode's length, "
                            f"{MAX_EPISODE_STEPS}, or more")
        least *= MAX_EPISODE_STEPS // getattr(args, "action_repeat", 1)
        why = "an episode"
    if args.buffer_size < least:
        raise UserError(f"--buffer-size must hold {why} of each of {args.num_envs} environments, "
                        f"{least} transitions or more, not {args.buffer_size}")
    return dataclasses.replace(args, env_id=resolve_env_id(args.env_id))


def steps_per_iteration(args: Any) -> int:
    """Environment steps that all environments together take between two actions."""
    return args.num_envs * getattr(args, "action_repeat", 1)


def resumed_folder(argv: list[str]) -> str | None:
    """The value of --resume in `argv`, if any; a missing value is left to the parser."""
    for i, word in enumerate(argv):
        if word == "--resume" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith("--resume="):
            return word.removeprefix("--resume=")
    return None


def run_script(main: Callable[[ArgsT], object], args_type: type[ArgsT]) -> None:
    """Parse the command line and run `main`.

    What the user can mend, and a full or read-only disk, ends the process with one line on stderr
    and status 2, a worker's failure with its last words and 1, Ctrl-C with 130; any other error
    keeps its traceback.
    """
    status = 2
    try:
        share_cores()
        main(parse_args(args_type, sys.argv[1:]))
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"{error.strerror}: {error.filename or 'the run folder'}; what was saved is safe"
    except WorkerError as error:
        message, status = f"{error}; what was saved is safe", 1
    except (MemoryError, RuntimeError) as error:
        # XLA's and torch's are RuntimeErrors: "RESOURCE_EXHAUSTED: ..." and "CUDA out of memory".
        full = "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)
        if not isinstance(error, MemoryError) and not full:
            raise
        message = "out of memory: choose smaller batches, buffers or networks"
    except KeyboardInterrupt:  # during the set-up, or the second one: `Run` handles the first
        message, status = "interrupted", 130
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
