"""The flags that all scripts have, their checks, and the types that give a flag its range.

A script writes the range of a flag as its type, for example `rho: NotNegativeFloat = 0.05`. Flags
of plain types (`int`, `float`, `str`, `bool`, tuples of them) may have any value. What else can be
wrong with a flag of its own a script checks itself.
"""

import dataclasses
import math
import os
import shutil
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, MinLen, Predicate

from common.errors import UserError
from common.run_folder import check_run_dir, saved_steps

if TYPE_CHECKING:
    from common.envs.suite import Suite

PositiveInt = Annotated[int, Ge(1)]
NotNegativeInt = Annotated[int, Ge(0)]
FiniteFloat = Annotated[float, Predicate(math.isfinite)]
PositiveFloat = Annotated[float, Gt(0)]
NotNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Gt(0), Le(1)]  # above 0, at most 1
Share = Annotated[float, Ge(0), Le(1)]  # 0 and 1 are both allowed
PositiveInts = Annotated[tuple[PositiveInt, ...], MinLen(1)]
Goal = Literal["fixed", "random", "random-hidden"]  # of Meta-World's tasks, see `VecMetaWorld`
GOALS: tuple[Goal, ...] = typing.get_args(Goal)

LARGEST = 2**31 - 1  # counters on the device are int32
LEAST_COLUMNS = 40  # of a terminal, for a help text
# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = {"resume", "total_timesteps", "eval_every", "checkpoint_every", "log_every", "track",
              "wandb_project", "wandb_entity", "capture_video", "drop_replay"}


@dataclass(frozen=True)
class RunArgs:
    """What is run and how it is recorded; the script's own `Args` add the method."""

    env_id: str = "drawer-open-v3"  # a task, e.g. any of Meta-World v3; v2 names are aliases
    seed: NotNegativeInt = 0  # seed of everything: goals, networks, exploration, sampling
    total_timesteps: PositiveInt = 1_000_000  # environment steps, summed over the environments
    num_envs: PositiveInt = 8  # environments stepped side by side
    utd: float = 1.0  # updates per environment step (per action, where actions are repeated)
    eval_every: PositiveInt = 10_000  # environment steps between evaluations of the mean action
    eval_episodes: NotNegativeInt = 0  # per evaluation; 0: 1 where all are the same, else 10
    checkpoint_every: NotNegativeInt = 50_000  # steps between checkpoints; 0: only at the end
    log_every: PositiveInt = 1_000  # environment steps between rows of metrics
    run_dir: str | None = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to continue, with the arguments it was started with
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project: str = "furl"  # project for --track
    wandb_entity: str | None = None  # user or team that the project belongs to; default: yours
    capture_video: bool = False  # a video of each evaluation in <run folder>/videos
    drop_replay: bool = False  # delete the replay's files when the run has finished

    @property
    def reward_shift(self) -> float:  # added to the task's reward; minus one on Meta-World (B.2)
        from common.envs.registry import suite_for

        return suite_for(self.env_id).reward_shift

    @property
    def updates_per_iteration(self) -> int:
        return round(self.utd * self.num_envs)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps that all environments together take between two actions."""
        return self.num_envs


ArgsT = TypeVar("ArgsT", bound=RunArgs)


@cache
def note(text: str) -> None:
    """Say it once, though environments and VLMs are made several times."""
    print(f"note: {text}", flush=True)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse(args_type: Any, argv: list[str] | None = None, **options: Any) -> Any:
    """`tyro.cli`, whose help takes all memory in a terminal of a few columns."""
    import tyro

    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)
    return tyro.cli(args_type, args=argv, **options)


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value that was read from JSON is of the type of a flag; True for types that are not
    JSON's."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return has_type(value, members[0])
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, member) for member in members)
    if origin is typing.Literal:
        return value in members
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = members[:1] * len(value) if members[1:] == (...,) else members
        return len(kinds) == len(value) and all(map(has_type, value, kinds))
    if kind is types.NoneType:
        return value is None
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str) else True


def check_range(value: Any, kind: Any, flag: str) -> None:
    """Raises:
        UserError: `value` is outside the range that the type `kind` of `flag` gives.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):  # such as PositiveInt | None
        for member in typing.get_args(kind):
            check_range(value, member, flag)
        return
    limits: tuple[Any, ...] = ()
    if origin is Annotated:
        kind, *limits = typing.get_args(kind)
    if isinstance(value, tuple):
        if not value and any(isinstance(limit, MinLen) for limit in limits):
            raise UserError(f"{flag} must not be empty")
        for element in value:
            check_range(element, (typing.get_args(kind) or (None,))[0], flag)
        return
    limits = [limit for limit in limits if isinstance(limit, Ge | Gt | Le | Predicate)]
    if not limits or not isinstance(value, int | float):
        return
    for limit in limits:
        match limit:
            case Ge(ge=least) if not value >= least:
                raise UserError(f"{flag} must be {least} or more, not {value}")
            case Gt(gt=bound) if not value > bound:
                raise UserError(f"{flag} must be above {bound}, not {value}")
            case Le(le=most) if not value <= most:
                raise UserError(f"{flag} must be at most {most}, not {value}")
            case Predicate(func=allows) if not allows(value):
                raise UserError(f"{flag} cannot be {value}")
    if isinstance(value, int) and value > LARGEST:
        raise UserError(f"{flag} must be at most {LARGEST}, not {value}")
    if not math.isfinite(value):
        raise UserError(f"{flag} must be a finite number, not {value}")


def check_ranges(args: Any) -> None:
    """Raises:
        UserError: a flag is outside the range that its type gives.
    """
    kinds = typing.get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        check_range(getattr(args, field.name), kinds[field.name], flag_of(field.name))


def check_args(args: ArgsT, suite: "Suite") -> ArgsT:
    """`args` with the task's full name and as many steps as whole iterations take.

    Checks the flags of `RunArgs`, and the ranges that the script gives its own as their types.

    Raises:
        UserError: names the first flag whose value cannot work, and what can.
    """
    check_ranges(args)
    args = dataclasses.replace(args, env_id=suite.resolve_env_id(args.env_id))
    updates = args.utd * args.num_envs
    whole = round(updates) if math.isfinite(updates) else 0
    if not 1 <= whole <= LARGEST or abs(updates - whole) > 1e-6:
        nearest = min(max(whole, 1), LARGEST) / args.num_envs
        raise UserError(f"--utd {args.utd!r} x --num-envs {args.num_envs} gives {updates:.10g} "
                        f"updates per iteration: it must be a whole number from 1 to {LARGEST}, "
                        f"as with --utd {nearest!r}")
    if not args.resume:
        check_run_dir(args.run_dir)
    iteration = args.steps_per_iteration
    whole = -(-args.total_timesteps // iteration) * iteration
    if whole > LARGEST:
        raise UserError(f"--total-timesteps must be at most {LARGEST}, not {whole}")
    if args.resume and whole < (done := saved_steps(Path(args.resume)) or 0):
        raise UserError(f"--total-timesteps {whole} is less than the {done} steps that "
                        f"{args.resume} has done")
    note_idle(args, track="wandb_project wandb_entity")
    if suite.all_same(getattr(args, "goal", "")) and args.eval_episodes > 1:
        print(f"note: with --goal fixed all {args.eval_episodes} evaluation episodes are the same")
    if whole != args.total_timesteps:
        print(f"note: --total-timesteps {args.total_timesteps} becomes {whole}, whole iterations "
              f"of {iteration} steps")
    return dataclasses.replace(args, total_timesteps=whole)


def check_replay(
    args: RunArgs, buffer_size: int, learning_starts: int, episode_length: int | None = None
) -> None:
    """For scripts with a replay: whether it is large enough; a line if nothing will be trained.

    Args:
        args: after `check_args`.
        buffer_size: transitions in the replay.
        learning_starts: environment steps before the first update.
        episode_length: actions in an episode, where whole episodes are looked at in the replay.

    Raises:
        UserError: it cannot hold a step, or an episode, of each environment.
    """
    least = args.num_envs * (episode_length or 1)
    if buffer_size < least:
        what = "an episode" if episode_length else "a step"
        raise UserError(f"--buffer-size must hold {what} of each of {args.num_envs} environments, "
                        f"{least} transitions or more, not {buffer_size}")
    if args.total_timesteps - args.steps_per_iteration < max(learning_starts, 1):
        print(f"note: nothing is trained: --total-timesteps {args.total_timesteps} must be above "
              f"--learning-starts {learning_starts}, until which actions are random")


def check_positives(frames: int, lag: int, needed: int, episode_length: int) -> None:
    """Whether positives can be ranked: they are frames of successes, `lag` steps after the first.

    Args:
        frames: --embedding-buffer-size, all that are kept.
        lag: --lag, steps between two frames that are compared.
        needed: --stage2-after, positives from which they are ranked on; 0: they never are.
        episode_length: frames in an episode.

    Raises:
        UserError: an episode does not fit, or as many are never there.
    """
    if frames < episode_length:
        raise UserError(f"--embedding-buffer-size must hold an episode, {episode_length} frames or "
                        f"more, not {frames}")
    if not needed:
        return
    if lag >= episode_length:
        raise UserError(f"--lag must be below the length of an episode, {episode_length}, not "
                        f"{lag}: no frame would have one to be compared with")
    most = frames * (episode_length - lag) // episode_length  # the first `lag` do not count
    if needed > most:
        raise UserError(f"--stage2-after must be at most {most}, not {needed}: more positives "
                        f"after --lag {lag} steps are not in an --embedding-buffer-size of "
                        f"{frames}")


def check_at_most(args: Any, name: str, most: int, why: str) -> None:
    """For a flag whose largest value depends on other flags.

    Args:
        args: the script's.
        name: of the flag's field.
        why: what the limit is, for the message.

    Raises:
        UserError: the flag's value is larger than `most`.
    """
    if getattr(args, name) > most:
        raise UserError(f"{flag_of(name)} must be at most {most}, {why}, not {getattr(args, name)}")


def note_idle(args: Any, **switches: str) -> None:
    """Say so if flags were given another value than their default, but another one switches off
    all that they are for.

    Args:
        args: the script's.
        switches: for fields of flags of the kind `--no-relay`, the fields of the flags that only
            matter with it, e.g. `relay="relay_periods relay_noise"`. A flag is named once.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    named: set[str] = set()
    for switch, names in switches.items():
        idle = [name for name in names.split()
                if name not in named and getattr(args, name) != defaults[name]]
        if idle and not getattr(args, switch):
            print(f"note: without effect beside {flag_of(f'no_{switch}')}: "
                  f"{', '.join(map(flag_of, idle))}")
            named.update(idle)
