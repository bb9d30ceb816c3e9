"""The command line that all scripts share: its parsing, --resume and errors."""

import argparse
import dataclasses
import errno
import inspect
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from common.cache import keep_compiled_programs
from common.cores import share_cores
from common.envs.registry import suite_for
from common.envs.workers import WorkerError
from common.errors import UserError
from common.flags import MAY_CHANGE, flag_of, has_type, parse
from common.run_folder import read_config

ArgsT = TypeVar("ArgsT")

# Of the disk: what a user must mend, and what may be otherwise when the run is tried again.
DISK_ERRORS = {errno.EROFS, errno.EACCES, errno.EFBIG, errno.ENAMETOOLONG}
PASSING_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def parse_args(args_type: type[ArgsT], argv: list[str]) -> ArgsT:
    """Parse `argv` into the script's frozen dataclass.

    With `--resume FOLDER` the stored run's arguments are the defaults, and only bookkeeping flags
    and `--total-timesteps` may be given other values.

    Raises:
        UserError: the folder holds no run of this script, or a flag may not change.
    """
    folder = resumed_folder(argv)
    if folder is None:
        return parse(args_type, argv)
    config = read_config(Path(folder))
    ours = script_name(args_type)
    if config.get("script") != ours:
        raise UserError(f"--resume {folder}: that run is {config.get('script')}.py's, this is "
                        f"{ours}.py")
    default = stored_args(config["args"], args_type, f"--resume {folder}")
    names = {f.name for f in dataclasses.fields(args_type)}
    args = parse(args_type, argv, default=default)
    env_id = suite_for(args.env_id).resolve_env_id(args.env_id)
    args = dataclasses.replace(args, env_id=env_id)  # an alias is no change
    for name in sorted(names - MAY_CHANGE):
        if getattr(args, name) != getattr(default, name):
            raise UserError(f"{flag_of(name)} cannot change in a resumed run: it is "
                            f"{getattr(default, name)}, not {getattr(args, name)}")
    return args


def source_file(args_type: type) -> Path | None:
    """The script that defines `args_type`; None where there is no file, as in a notebook."""
    try:
        return Path(inspect.getfile(args_type)).resolve()
    except (TypeError, OSError):
        return None


def script_name(args_type: type) -> str:
    """The name of the script that defines `args_type`, which is that of its file."""
    source = source_file(args_type)
    return source.stem if source else "interactive"


def stored_args(stored: dict[str, Any], args_type: type[ArgsT], name: str) -> ArgsT:
    """The arguments in a run's config.json as the script's dataclass.

    Flags that the stored run lacks take their defaults, flags that are gone are left out; one line
    names each kind. `name` is what it calls the run.

    Raises:
        UserError: a stored value has another type than the flag.
    """
    fields = {f.name: f for f in dataclasses.fields(args_type)}
    kinds = typing.get_type_hints(args_type, include_extras=True)
    for key, value in stored.items():
        if key in fields and not has_type(value, kinds[key]):
            raise UserError(f"{name}: its config.json has {flag_of(key)} {value!r}, which is of "
                            "another type than the flag")
    new, gone = ([n for n in one if n not in other] for one, other in
                 ((fields, stored), (stored, fields)))
    if new:
        print(f"note: {name} was made before these flags, which take their defaults: "
              + ", ".join(map(flag_of, new)))
    if gone:
        print(f"note: {name} has flags that are gone and ignored: "
              + ", ".join(f"{flag_of(n)} {stored[n]}" for n in gone))
    return args_type(**{n: tuple(v) if isinstance(v, list) else v
                        for n, v in stored.items() if n in fields})


def resumed_folder(argv: list[str]) -> str | None:
    """The value of --resume in `argv`, if any; a missing value is left to the parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    return parser.parse_known_args(argv)[0].resume


def check_device() -> None:
    """Raises:
        UserError: JAX has no device of the kind that JAX_PLATFORMS asks for.
    """
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:  # JAX takes what there is
        return
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # without an NVIDIA GPU it only asserts
        reason = (str(error).strip().splitlines() or ["there is none"])[0]
        raise UserError(f"JAX_PLATFORMS={asked}: JAX finds no such device here ({reason}); unset "
                        "the variable, or set it to cpu") from None


def run_script(main: Callable[[ArgsT], object], args_type: type[ArgsT]) -> None:
    """Parse the command line and run `main`.

    What the user can mend ends the process with one line on stderr and status 2; so does, with
    status 1, what may pass: a full disk or memory, a worker's failure. Ctrl-C ends it with 130; any
    other error keeps its traceback.
    """
    status = 2
    try:
        share_cores()
        keep_compiled_programs()
        args = parse_args(args_type, sys.argv[1:])
        check_device()
        main(args)
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        if error.errno not in DISK_ERRORS | PASSING_DISK_ERRORS:
            raise
        status = 1 if error.errno in PASSING_DISK_ERRORS else 2
        message = f"{error.strerror}: {error.filename or 'the run folder'}; what was saved is safe"
    except WorkerError as error:
        message, status = f"{error}; what was saved is safe", 1
    except (MemoryError, RuntimeError) as error:
        # XLA's and torch's are RuntimeErrors: "RESOURCE_EXHAUSTED: ..." and "CUDA out of memory".
        full = "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)
        if not isinstance(error, MemoryError) and not full:
            raise
        message, status = "out of memory: choose smaller batches, buffers or networks", 1
    except KeyboardInterrupt:  # during the set-up, or the second one: `Run` handles the first
        message, status = "interrupted", 130
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
