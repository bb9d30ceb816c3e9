"""The suite of the official Meta-World: its environments, their state, and their pictures."""

import hashlib
from importlib import metadata
from typing import Any

import mujoco
import numpy as np

from common.cache import cached_arrays
from common.envs.metaworld_tasks import (
    baseline_prompt_for,
    expert_action,
    expert_policy,
    prompt_for,
    resolve_env_id,
)
from common.envs.rendering import Camera, Renderer, mesh_settings
from common.envs.suite import Draw, Suite
from common.envs.workers import VecEnv
from common.errors import UserError
from common.flags import GOALS, Goal

OBS_DIM, ACTION_DIM = 39, 4
OBJECT = slice(4, 7)  # of an observation: where the object is, or its part that moves, meters
GOAL = slice(36, 39)  # zeros where the goal is hidden
MAX_EPISODE_STEPS = 500  # Meta-World's own limit, the same for all tasks
EXPERT_NOISE = 0.1  # standard deviation of what is added to the actions of `Experts`
EXPERT_STREAM = 2  # with the seed: name of a stream of random numbers; scripts have 0 and 1
# What tasks move in the model itself when they are reset.
MODEL_FIELDS = ("body_pos", "body_quat", "site_pos", "site_quat", "geom_pos", "geom_quat",
                "eq_data")
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
# Arrays of the simulator, which each step changes. Some tasks have an attribute that is a view of a
# part of one (so that an "initial position" moves). When restored it must be a view again.
VIEWED_FIELDS = ("xpos", "xipos", "site_xpos", "geom_xpos")


class VecMetaWorld(VecEnv):
    """N environments of one task in worker processes.

    Args:
        env_id: a task of `common.envs.metaworld_tasks`.
        num_envs: N.
        seed: decides the fixed goal, or the sequences of random goals.
        goal: `fixed`: hidden, one per seed, the same in all environments and episodes; `random`:
            new in every episode and part of the observation; `random-hidden`: new, not observed.
        camera: what draws the frames; None: none are drawn.
        show_goal: put the goal into the observation whatever `goal` says (scripted experts need
            it).
        max_episode_steps: 1 to 500, physics steps.
        options: those of `VecEnv`.

    Raises:
        UserError, WorkerError: as `VecEnv`; UserError for an unknown task or goal mode too.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        seed: int,
        goal: Goal = "fixed",
        camera: Camera | None = None,
        show_goal: bool = False,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        **options: Any,
    ):
        env_id = resolve_env_id(env_id)
        self.engine = f"metaworld {metadata.version('metaworld')}, mujoco {mujoco.__version__}"
        env = {"env_id": env_id, "seed": seed, "goal": goal, "show_goal": show_goal}
        super().__init__(
            __name__, env, num_envs, obs_dim=OBS_DIM, action_dim=ACTION_DIM, camera=camera,
            max_episode_steps=max_episode_steps, **options,
        )


class Experts:
    """Meta-World's scripted experts for the first episodes of environments 0 to `num_envs` - 1.

    They are shown the goals, whatever the policy is shown, and act with a little noise.

    Args:
        env_id, seed, goal: as for `VecMetaWorld`.
        num_envs: how many there are.
    """

    def __init__(self, env_id: str, num_envs: int, *, seed: int, goal: Goal):
        self._seed = seed
        self._policies = [expert_policy(env_id) for _ in range(num_envs)]
        # These have the seeds of the environments that the policy plays in, and so their goals.
        copies = [make_env(env_id, seed=seed, index=i, goal=goal, show_goal=True)
                  for i in range(num_envs)]
        self._goals = np.array([env.reset()[0][GOAL] for env in copies]).reshape(num_envs, 3)

    def __call__(self, obs: np.ndarray, time: int) -> np.ndarray:
        """Their actions at step `time` for the first of obs [n, 39], float32 [num_envs, 4]."""
        actions = np.zeros((len(self._policies), ACTION_DIM), np.float32)
        for i, policy in enumerate(self._policies):
            seen = obs[i].astype(np.float64)
            seen[GOAL] = self._goals[i]
            actions[i] = expert_action(policy, seen)
        rng = np.random.default_rng((self._seed, EXPERT_STREAM, time))
        noise = EXPERT_NOISE * rng.normal(size=actions.shape)
        return np.clip(actions + noise, -1, 1).astype(np.float32)


# -------------------------------------------------- what a worker uses, see `Suite`


def make_env(env_id: str, *, seed: int, index: int, goal: Goal, show_goal: bool):
    """One official environment.

    With a fixed goal it is Meta-World's environment of `seed`. Random goals are drawn from (seed,
    index): environment number `index` has the same goals in whichever worker it is.

    Raises:
        UserError: unknown goal mode.
    """
    from metaworld.env_dict import (
        ALL_V3_ENVIRONMENTS_GOAL_HIDDEN,
        ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE,
    )

    if goal not in GOALS:
        raise UserError(f"unknown goal mode {goal!r}; allowed: {', '.join(GOALS)}")
    if show_goal or goal == "random":
        env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{env_id}-goal-observable"](seed=seed)
    else:
        env = ALL_V3_ENVIRONMENTS_GOAL_HIDDEN[f"{env_id}-goal-hidden"](seed=seed)
    if goal != "fixed":
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.np_random = np.random.default_rng(np.random.SeedSequence((seed, index)))
    return env


def get_env_state(env) -> dict[str, Any]:
    """Everything that the next steps of an environment depend on."""
    physics = np.empty(mujoco.mj_stateSize(env.model, PHYSICS))
    mujoco.mj_getState(env.model, env.data, physics, PHYSICS)
    plain = bool | int | float | str | np.ndarray | np.generic | None
    attributes, views = {}, {}
    for name, value in vars(env).items():
        if isinstance(value, np.ndarray) and (view := _view_of(env.data, value)):
            views[name] = view
        elif isinstance(value, plain):
            attributes[name] = value.copy() if isinstance(value, np.ndarray) else value
    return {
        "physics": physics,
        "model": {name: getattr(env.model, name).copy() for name in MODEL_FIELDS},
        "attributes": attributes,
        "views": views,
        "rng": env.np_random.bit_generator.state,
    }


def _view_of(data: mujoco.MjData, value: np.ndarray) -> tuple[str, int, int] | None:
    """The field, first element and size of the simulator's array that `value` is a view of."""
    for name in VIEWED_FIELDS:
        field = getattr(data, name)
        if np.may_share_memory(value, field):
            return name, (value.ctypes.data - field.ctypes.data) // field.itemsize, value.size
    return None


def set_env_state(env, state: dict[str, Any]) -> None:
    """Continue from what `get_env_state` returned."""
    for name, value in state["model"].items():
        getattr(env.model, name)[:] = value
    for name, value in state["attributes"].items():
        setattr(env, name, value.copy() if isinstance(value, np.ndarray) else value)
    for name, (field, start, size) in state["views"].items():
        setattr(env, name, getattr(env.data, field).reshape(-1)[start : start + size])
    env.np_random.bit_generator.state = state["rng"]
    mujoco.mj_setState(env.model, env.data, state["physics"], PHYSICS)
    mujoco.mj_forward(env.model, env.data)  # computes what depends on the state ...
    # ... and changes a part of it, the solver's starting point for the next step: set it again.
    mujoco.mj_setState(env.model, env.data, state["physics"], PHYSICS)


def make_draw(env, camera: Camera) -> Draw:
    """The picture of any environment of this one's task."""
    renderer = Renderer(env.model, camera)
    return lambda env: renderer.render(env.model, env.data)


# ------------------------------------------------------------------------ goal image


def goal_image(env_id: str, *, seed: int, goal: Goal, camera: Camera) -> np.ndarray:
    """The picture at the scripted expert's first success, as `camera` draws it, cached on disk.

    With a fixed goal it is the run's own; with random goals it is one goal's (B.2 of the paper).

    Raises:
        UserError: an argument is not allowed, or the expert does not succeed within 500 steps.
    """
    env_id = resolve_env_id(env_id)

    def play() -> dict[str, np.ndarray]:
        env = make_env(env_id, seed=seed, index=0, goal=goal, show_goal=True)
        policy = expert_policy(env_id)
        obs, _ = env.reset()
        for _ in range(MAX_EPISODE_STEPS):
            obs, _, _, _, info = env.step(expert_action(policy, obs))
            if info["success"]:
                renderer = Renderer(env.model, camera)
                picture = renderer.render(env.model, env.data)
                renderer.close()
                return {"picture": picture}
        raise UserError(f"the scripted expert fails on {env_id} with seed {seed}, so there is no "
                        "goal image: use --no-goal-image or another --seed")

    settings = (goal, camera.id, camera.quality, camera.square, mesh_settings(camera.quality),
                metadata.version("metaworld"), mujoco.__version__)
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    key = f"{env_id}-{seed}-{camera.size}-{digest}"
    return cached_arrays("goal_images", key, play)["picture"]


SUITE = Suite(
    resolve_env_id, prompt_for, baseline_prompt_for,
    default_vlm=lambda env_id: "mini", evaluated_on=lambda env_id: env_id, make_vec=VecMetaWorld,
    cameras=("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV"),
    default_camera=2, crops_border=True,  # as in the paper
    reward_shift=-1.0,  # B.2 of the paper
    starts_differ=False, lengths_differ=False, shows_returns=False,
    sparse_reward=True,  # Meta-World's own reward is not used
    make_env=make_env, make_draw=make_draw, elapsed_steps=lambda env: env.curr_path_length,
    get_env_state=get_env_state, set_env_state=set_env_state,
)
