"""The command line that all scripts share: its parsing, its checks, --resume and errors."""

import dataclasses
import errno
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from common.cache import keep_compiled_programs
from common.cores import share_cores
from common.envs.workers import WorkerError
from common.errors import UserError
from common.flags import LARGEST, check_range, has_type, parse
from common.run_folder import check_run_dir, read_config

ArgsT = TypeVar("ArgsT")

# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = {"resume", "total_timesteps", "eval_every", "checkpoint_every", "log_every", "track",
              "wandb_project", "wandb_entity", "capture_video", "drop_replay"}
# Of the disk: what a user must mend, and what may be otherwise when the run is tried again.
DISK_ERRORS = {errno.EROFS, errno.EACCES, errno.EFBIG}
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


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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


def check_ranges(args: Any) -> None:
    """Raises:
        UserError: a flag is outside the range that its type gives.
    """
    kinds = typing.get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        check_range(getattr(args, field.name), kinds[field.name], flag_of(field.name))


def check_args(args: ArgsT, suite: ModuleType, whole_episodes: bool = False) -> ArgsT:
    """`args` with the task's full name and as many steps as whole iterations take.

    Checks what shared code needs, and the ranges that the script gives its flags as their types.

    Args:
        args: the script's.
        suite: the module of the environments, see `common.envs.suites`.
        whole_episodes: the script looks at whole episodes in its replay, as `check_episodes_fit`
            says; the suite must have `MAX_EPISODE_STEPS` then.

    Raises:
        UserError: names the first flag whose value cannot work, and what can.
    """
    check_ranges(args)
    args = dataclasses.replace(args, env_id=suite.resolve_env_id(args.env_id))
    defaults = {"camera_id": suite.DEFAULT_CAMERA, "vlm": suite.default_vlm(args.env_id)}
    for name, default in defaults.items():
        if getattr(args, name, default) is None:
            args = dataclasses.replace(args, **{name: default})
    if getattr(args, "camera_id", 0) >= len(suite.CAMERAS):
        listed = ", ".join(f"{i} ({name})" for i, name in enumerate(suite.CAMERAS))
        raise UserError(f"unknown camera {args.camera_id}; this task has {listed}")
    updates = args.utd * args.num_envs
    whole = round(updates) if math.isfinite(updates) else 0
    if not 1 <= whole <= LARGEST or abs(updates - whole) > 1e-6:
        nearest = min(max(whole, 1), LARGEST) / args.num_envs
        raise UserError(f"--utd {args.utd!r} x --num-envs {args.num_envs} gives {updates:.10g} "
                        f"updates per iteration: it must be a whole number from 1 to {LARGEST}, "
                        f"as with --utd {nearest!r}")
    size = getattr(args, "buffer_size", args.num_envs)  # a script may have none, or its own
    if size < args.num_envs:
        raise UserError(f"--buffer-size must hold a step of each of {args.num_envs} environments, "
                        f"{args.num_envs} transitions or more, not {size}")
    if whole_episodes:
        check_episodes_fit(args, suite.MAX_EPISODE_STEPS)
    if not args.resume:
        check_run_dir(args.run_dir)
    iteration = steps_per_iteration(args)
    whole = -(-args.total_timesteps // iteration) * iteration
    if whole > LARGEST:
        raise UserError(f"--total-timesteps must be at most {LARGEST}, not {whole}")
    if whole != args.total_timesteps:
        print(f"note: --total-timesteps {args.total_timesteps} becomes {whole}, whole iterations "
              f"of {iteration} steps")
    return dataclasses.replace(args, total_timesteps=whole)


def check_episodes_fit(args: Any, episode_length: int) -> None:
    """For scripts that look at whole episodes in the replay, and may copy them from there.

    Args:
        args: with `num_envs`, `buffer_size` if it has a replay of that size, and
            `embedding_buffer_size` if episodes are copied.
        episode_length: actions in an episode.

    Raises:
        UserError: a buffer is too small for that.
    """
    frames = getattr(args, "embedding_buffer_size", episode_length)
    if frames < episode_length:
        raise UserError(f"--embedding-buffer-size must hold an episode, {episode_length} frames or "
                        f"more, not {frames}")
    least = args.num_envs * episode_length
    size = getattr(args, "buffer_size", least)
    if size < least:
        raise UserError(f"--buffer-size must hold an episode of each of {args.num_envs} "
                        f"environments, {least} transitions or more, not {size}")


def check_alignment(args: Any, episode_length: int) -> None:
    """For scripts with FuRL's alignment: whether the alignment can begin, and which flags are idle.

    Args:
        args: with the fields that are named here.
        episode_length: actions in an episode.

    Raises:
        UserError: Eq. 4 could never take its turn.
    """
    note_idle(args, "align", "stage2_after", "projection_features", "lag", "reward_margin",
              "l2_margin")
    if not args.align:
        return
    note_idle(args, "goal_image", "l2_margin")
    note_idle(args, "stage2", "stage2_after", "lag")
    if not args.stage2:
        if not args.goal_image:
            print("note: --no-goal-image --no-stage2 leave nothing to align with: the projection "
                  "heads stay random")
        return
    if args.lag >= episode_length:
        raise UserError(f"--lag must be below the length of an episode, {episode_length}, not "
                        f"{args.lag}: no frame would have one to be compared with")
    # Of a buffer full of whole episodes the first `lag` frames of each do not count.
    most = args.embedding_buffer_size * (episode_length - args.lag) // episode_length
    if args.stage2_after > most:
        raise UserError(f"--stage2-after must be at most {most}, not {args.stage2_after}: more "
                        f"positives after --lag {args.lag} steps are not in an "
                        f"--embedding-buffer-size of {args.embedding_buffer_size}")


def note_untrained(args: Any) -> None:
    """Say so if a run of whole iterations ends before its first update."""
    starts = getattr(args, "learning_starts", 0)
    if args.total_timesteps - steps_per_iteration(args) < max(starts, 1):
        print(f"note: nothing is trained: --total-timesteps {args.total_timesteps} must be above "
              f"--learning-starts {starts}, until which actions are random")


def note_idle(args: Any, switch: str, *names: str) -> None:
    """Say so if flags were given another value than their default, but another one switches off
    all that they are for.

    Args:
        args: the script's.
        switch: field of a flag of the kind `--no-relay`.
        names: fields of the flags that only matter with it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    idle = [flag_of(name) for name in names if getattr(args, name) != defaults[name]]
    if idle and not getattr(args, switch):
        print(f"note: without effect beside {flag_of(f'no_{switch}')}: {', '.join(idle)}")


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
