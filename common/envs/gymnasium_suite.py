"""The suite of Gymnasium: any of its environments that draws itself (`render_mode="rgb_array"`).

An id is one that `gymnasium.make` knows, `module:Name-v0` for one that a module registers.
Continuous actions are scaled to -1 to 1. What an environment returns is checked against Gymnasium's
contract and flattened to one vector, see `contract.py`.
"""

import difflib
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv, mujoco_rendering
from PIL import Image

from common.envs import contract, vlm_rm_tasks
from common.envs.rendering import Camera, prepare_gl
from common.envs.suite import Draw, Suite
from common.envs.vlm_rm_tasks import task_for
from common.envs.workers import VecEnv
from common.errors import UserError, first_line
from common.flags import Goal, flag_of, note
from common.system import GL

DEFAULT_MAX_EPISODE_STEPS = 1_000  # where an environment has no limit
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
# Modules whose environments have no state but their attributes, and MuJoCo's.
KNOWN_STATE = ("gymnasium.envs.classic_control.", "gymnasium.envs.mujoco.", "common.envs.")
# Wrappers without a state of their own but for the number of steps, which is saved.
STATELESS = (contract.Checked, gymnasium.wrappers.OrderEnforcing, gymnasium.wrappers.RescaleAction,
             gymnasium.wrappers.TimeLimit)

vlm_rm_tasks.register()
# Gymnasium's own renderer does not know what draws on macOS.
mujoco_rendering._ALL_RENDERERS.setdefault(GL, mujoco.GLContext)


def resolve_env_id(name: str) -> str:
    """The id itself.

    Raises:
        UserError: no such environment; names the closest ones.
    """
    if name.startswith("."):  # a relative import
        raise UserError(f"unknown environment {name!r}; its module needs its full name")
    try:
        _spec(name)
    except ImportError as error:
        raise UserError(f"unknown environment {name!r}; {error}") from None
    except gymnasium.error.Error as error:
        closest = difflib.get_close_matches(name, gymnasium.registry, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(closest)}?" if closest else first_line(error)
        raise UserError(f"unknown environment {name!r}; {hint}") from None
    return name


def _spec(env_id: str) -> gymnasium.envs.registration.EnvSpec:
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)  # which registers it
    return gymnasium.spec(name)


def max_episode_steps(env_id: str) -> int:
    """Steps after which an episode is truncated."""
    return _spec(env_id).max_episode_steps or DEFAULT_MAX_EPISODE_STEPS


def _text(env_id: str, text: str | None, kind: str) -> str:
    """The prompt or baseline prompt (`kind`) of a run: any text, or the task's own (None).

    Raises:
        UserError: it is empty, or the environment has none of its own.
    """
    flag = flag_of(kind)
    if text is None:
        text = getattr(task_for(env_id), kind)
        if text is None:
            raise UserError(f"{env_id} has no {kind.replace('_', ' ')} of its own: give {flag}")
    if not text.strip():
        raise UserError(f"{flag} must not be empty")
    return text.strip()


class VecGymnasium(VecEnv):
    """N environments of one id in worker processes.

    Args:
        env_id: see the module.
        num_envs: N.
        seed: of the environments' own generators, one for each.
        goal: Meta-World's; here `fixed`.
        camera: draws the frames; None: none are drawn. Frames are the environment's own pictures,
            scaled to the camera's size by `square`.
        options: those of `VecEnv`.

    Attributes:
        resumes_episodes: whether an episode's state can be saved: that of MuJoCo's and of classic
            control can. Else the episodes after a resumption are new ones.

    Raises:
        UserError, WorkerError: as `VecEnv`; UserError too where the environment breaks Gymnasium's
            contract, or has observations or actions of a kind that is not supported.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        seed: int,
        goal: Goal = "fixed",
        camera: Camera | None = None,
        **options: Any,
    ):
        if goal != "fixed":
            raise UserError(f"--goal {goal} is for Meta-World's tasks; {env_id} has one goal")
        size = camera.size if camera else 0
        resolve_env_id(env_id)
        before = contract.global_state()
        probe = _build(env_id, size)
        contract.try_out(probe, env_id)
        own_globals = before != contract.global_state()
        if own_globals:
            note(f"{env_id} draws from Python's or NumPy's global generator, not from its own "
                 "np_random: each environment gets a state of it of its own, from the seed")
        space = probe.action_space
        discrete = isinstance(space, gymnasium.spaces.Discrete)
        self.resumes_episodes = _state_is_known(probe) and not own_globals
        obs_dim = probe.observation_space.shape[0]
        probe.close()
        self.engine = f"gymnasium {gymnasium.__version__}, mujoco {mujoco.__version__}"
        env = {"env_id": env_id, "seed": seed, "frame_size": size, "own_globals": own_globals}
        super().__init__(
            __name__, env, num_envs,
            obs_dim=obs_dim, action_dim=int(space.n) if discrete else space.shape[0],
            discrete=discrete, max_episode_steps=max_episode_steps(env_id), camera=camera,
            **options,
        )


# -------------------------------------------------- what a worker uses, see `Suite`


def make_env(
    env_id: str, *, seed: int, index: int, frame_size: int, own_globals: bool = False
) -> gymnasium.Env:
    """Environment number `index`, seeded from (seed, index); its first episode has begun.

    `own_globals`: it draws from the global generators, see `contract.OwnGlobals`.

    Raises:
        UserError: see `VecGymnasium`.
    """
    first = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
    contract.seed_globals(first)  # for those that draw from there later than `try_out` sees
    env = _build(env_id, frame_size)
    if own_globals:
        env = contract.OwnGlobals(env)
    env.reset(seed=first)
    return env


def _build(env_id: str, frame_size: int) -> gymnasium.Env:
    # The limit comes last, around `Checked`: what it gets of a step it takes apart.
    options: dict[str, Any] = {"max_episode_steps": -1, "disable_env_checker": True}
    size: dict[str, int] = {}
    try:
        creator = _spec(env_id).entry_point
        if isinstance(creator, str):
            creator = gymnasium.envs.registration.load_env_creator(creator)
        is_class = isinstance(creator, type)  # not a function
        if frame_size:
            if is_class and "rgb_array" not in creator.metadata.get("render_modes", ()):
                raise UserError(f"{env_id} draws no frames (no render mode rgb_array), which are "
                                "needed here")
            options["render_mode"] = "rgb_array"
            if is_class and issubclass(creator, MujocoEnv):  # else it draws 480 px, that is slower
                size = {"width": frame_size, "height": frame_size}
        try:
            env = gymnasium.make(env_id, **options, **size)
        except TypeError:  # a class of one's own, which need not take a size
            if not size:
                raise
            env = gymnasium.make(env_id, **options)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise UserError(f"{env_id} cannot be made here: {first_line(error)}") from error
    env = _with_actions(contract.Checked(env, env_id), env_id)
    return gymnasium.wrappers.TimeLimit(env, max_episode_steps(env_id))


def _with_actions(env: gymnasium.Env, env_id: str) -> gymnasium.Env:
    """`env` with whole numbers from 0 on, or with numbers from -1 to 1, as its actions.

    Raises:
        UserError: its actions are others, or cannot be scaled.
    """
    spaces, space = gymnasium.spaces, getattr(env, "action_space", None)
    if isinstance(space, spaces.Discrete):
        if space.start != 0:
            raise UserError(f"the actions of {env_id} must be counted from 0")
        return env
    if not (isinstance(space, spaces.Box) and len(space.shape) == 1 and space.shape[0]
            and np.issubdtype(space.dtype, np.floating)):
        raise UserError(f"the actions of {env_id} are {space}: only Discrete and one-dimensional "
                        "Box of floats are supported")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    # Rounding leaves little of bounds like 1e9 and 1e9 + 1.
    rounding = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    if not ((high - low > 50 * rounding) & (high - low <= contract.LARGEST)).all():
        raise UserError(f"the actions of {env_id} are {space}: they have no bounds, or equal ones, "
                        "or too far apart, so that they cannot be scaled to -1 to 1")
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def make_draw(env: gymnasium.Env, camera: Camera) -> Draw:
    """The picture of any environment of this one's kind.

    Raises:
        UserError: what is drawn is no picture.
    """
    prepare_gl()
    if type(env.unwrapped).render is not MujocoEnv.render:
        # What it draws is checked now, on another one: drawing may change an environment's state.
        trial = _build(env.get_wrapper_attr("registered_id"), camera.size)
        trial.reset(seed=0)
        trial.render()
        trial.close()

    def draw(env: gymnasium.Env) -> np.ndarray:
        picture = square(env.render(), camera.size)
        return camera.square.of(picture) if camera.square else picture

    return draw


def square(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3], bicubic; a picture that is not square is squeezed.

    So the VLM-RM authors' code does it: the middle square would not have MountainCar's flag.
    """
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def _state_is_known(env: gymnasium.Env) -> bool:
    """Whether `get_env_state` holds all of the state, that of the wrappers included."""
    while env is not env.unwrapped:
        if type(env) not in STATELESS:
            return False
        env = env.env
    return type(env).__module__.startswith(KNOWN_STATE)


def get_env_state(env: gymnasium.Env) -> dict[str, Any]:
    """Everything that the next steps depend on; of an unknown kind of environment its generator."""
    base = env.unwrapped
    state: dict[str, Any] = {}
    if isinstance(base.np_random, np.random.Generator):  # some have put another kind there
        state["rng"] = base.np_random.bit_generator.state
    if not _state_is_known(env):
        if env.has_wrapper_attr("global_state"):
            state["globals"] = env.get_wrapper_attr("global_state")
        return state
    state["elapsed"] = env.get_wrapper_attr("_elapsed_steps")
    plain = bool | int | float | str | tuple | np.ndarray | np.generic | None
    state["attributes"] = {
        name: value.copy() if isinstance(value, np.ndarray) else value
        for name, value in vars(base).items() if isinstance(value, plain)
    }
    if isinstance(base, MujocoEnv):
        state["physics"] = np.empty(mujoco.mj_stateSize(base.model, PHYSICS))
        mujoco.mj_getState(base.model, base.data, state["physics"], PHYSICS)
        # A step leaves positions of bodies as they were before its last substep, and the next
        # reward may look at them: they cannot be computed again from the state.
        state["derived"] = {name: array.copy() for name, array in _arrays(base.data)}
        if (camera := _camera(base)) is not None:
            state["lookat"] = camera.lookat.copy()
    return state


def _camera(base: Any) -> Any:
    """The free camera of MuJoCo's pictures, which looks where its first picture's scene was."""
    return base.mujoco_renderer._get_viewer("rgb_array").cam if base.render_mode else None


def _arrays(data: mujoco.MjData) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(data):
        array = None if name.startswith("_") else getattr(data, name)
        if isinstance(array, np.ndarray) and array.dtype == np.float64 and array.flags.writeable:
            yield name, array


def set_env_state(env: gymnasium.Env, state: dict[str, Any]) -> np.ndarray | None:
    """Continue from what `get_env_state` returned; the observation of a new episode, if it is."""
    base = env.unwrapped
    if "attributes" not in state:
        if "rng" in state:
            base.np_random.bit_generator.state = state["rng"]
        if "globals" in state:
            env.set_wrapper_attr("global_state", state["globals"])
        return env.reset()[0]
    env.reset()  # else Gymnasium refuses to step
    base.np_random.bit_generator.state = state["rng"]
    for name, value in state["attributes"].items():
        setattr(base, name, value.copy() if isinstance(value, np.ndarray) else value)
    env.set_wrapper_attr("_elapsed_steps", state["elapsed"])
    if "physics" in state:
        mujoco.mj_setState(base.model, base.data, state["physics"], PHYSICS)
        mujoco.mj_forward(base.model, base.data)  # contacts and constraints, and with them sizes
        for name, array in _arrays(base.data):
            if array.shape == state["derived"][name].shape:
                array[:] = state["derived"][name]
        mujoco.mj_setState(base.model, base.data, state["physics"], PHYSICS)
        if (camera := _camera(base)) is not None:
            camera.lookat[:] = state["lookat"]
    return None


SUITE = Suite(
    resolve_env_id, prompt_for=partial(_text, kind="prompt"),
    baseline_prompt_for=partial(_text, kind="baseline_prompt"),
    default_vlm=lambda env_id: task_for(env_id).vlm,
    evaluated_on=lambda env_id: task_for(env_id).evaluated_on, make_vec=VecGymnasium,
    cameras=("the environment's own",), default_camera=0, crops_border=False, reward_shift=0.0,
    starts_differ=True, lengths_differ=True, shows_returns=True, sparse_reward=False,
    make_env=make_env, make_draw=make_draw,
    elapsed_steps=lambda env: env.get_wrapper_attr("_elapsed_steps"),
    get_env_state=get_env_state, set_env_state=set_env_state,
)
