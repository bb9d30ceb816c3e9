"""Episodes of scripted behaviour: the expert, with noise or giving up, and random actions."""

from functools import cache
from typing import NamedTuple

import mujoco
import numpy as np

from common.cores import ONE_THREAD
from common.envs.metaworld_suite import PHYSICS, make_env
from common.envs.metaworld_tasks import expert_action, expert_policy
from common.envs.rendering import Camera, Renderer

MAX_STEPS = 400
KINDS = ("expert", "sub-optimal", "random")
EXPERT, SUBOPTIMAL, RANDOM = range(3)
# For the processes of a pool: one core each; they draw and never load torch (`rendering.py`).
WORKER_ENVIRONMENT = ONE_THREAD | {"FURL_ENV_WORKER": "1"}
FIXED_GOAL_NOISE = 0.1  # without it the expert plays one and the same episode


def play_episode(
    env, task: str, noise: float | str, rng: np.random.Generator, *,
    num_steps: int | None = None, give_up: int = MAX_STEPS,
):
    """Physics states, success per step; `noise` on the expert's actions, or without it:

    `uniform`: independent uniform actions; `drift`: smooth random behaviour near the start;
    `wander`: to random points all over the workspace and on, into corners where no expert goes but
    where a learning agent does.

    Args:
        num_steps: so many exactly; None: until success has held for ten, 400 at most (150 without
            the expert).
        give_up: the step at which the expert gives up and wanders.

    Returns:
        physics [steps + 1, size], success [steps + 1] bool and the task's dense reward
        [steps + 1]; the first belong to the start, whose reward is 0.
    """
    policy = expert_policy(task)
    obs, _ = env.reset()
    states, success, rewards = [], [], []
    drift, target = np.zeros(4), None
    steps_left = num_steps or (150 if isinstance(noise, str) else MAX_STEPS)

    def record(is_success: bool, reward: float) -> None:
        physics = np.empty(mujoco.mj_stateSize(env.model, PHYSICS))
        mujoco.mj_getState(env.model, env.data, physics, PHYSICS)
        states.append(physics)
        success.append(is_success)
        rewards.append(reward)

    record(False, 0.0)
    while steps_left > 0:
        if noise == "uniform":
            action = rng.uniform(-1, 1, 4)
        elif noise == "drift":
            drift = 0.9 * drift + 0.35 * rng.normal(size=4)
            action = np.clip(drift, -1, 1)
        elif noise == "wander" or len(states) > give_up:
            if steps_left % 30 == 0 or target is None:
                target = rng.uniform(env.mocap_low, env.mocap_high)
                grip = rng.uniform(-1, 1)
            action = np.clip([*(10 * (target - obs[:3])), grip], -1, 1)
        else:
            action = np.clip(expert_action(policy, obs) + noise * rng.normal(size=4), -1, 1)
        obs, reward, _, _, info = env.step(action.astype(np.float32))
        record(bool(info["success"]), float(reward))
        # Success holds: a few more steps and the end.
        if num_steps is None and sum(success) == 2 and success[-2]:
            steps_left = min(steps_left, 10)
        steps_left -= 1
    return np.array(states), np.array(success), np.array(rewards)


class Scene(NamedTuple):
    """What is played and how it is drawn."""

    env_id: str
    goal: str  # `fixed` or `random`
    seed: int
    num_steps: int  # of each episode
    every: int  # steps from one picture to the next
    camera: Camera


class Drawn(NamedTuple):
    """One goal's episodes of the three `KINDS`, n pictures each."""

    frames: np.ndarray  # [3, n, size, size, 3] uint8
    success: np.ndarray  # [3, n] bool
    first_success: np.ndarray  # [3] int, the step; -1: never


class Data(NamedTuple):
    """E goals, three kinds of behaviour, n pictures of each episode."""

    embeddings: np.ndarray  # [E, 3, n, D]
    nearness: dict[str, np.ndarray]  # to the goal picture, [E, 3, n], by what measures it; or {}
    success: np.ndarray  # [E, 3, n] bool
    first_success: np.ndarray  # [E, 3] int, the step; -1: never
    frames: np.ndarray  # [3, n, side, side, 3], of the first goal, what the VLM sees


@cache
def _open_scene(scene: Scene):
    env = make_env(scene.env_id, seed=scene.seed, index=0, goal=scene.goal, show_goal=True)
    return env, Renderer(env.model, scene.camera)


def draw_episodes(scene: Scene, number: int) -> Drawn:
    """Play one goal three times, then draw every few steps.

    The expert; the expert that gives up after 30 to 90 % of its way and wanders, which may lead to
    success, but seldom does; uniformly random actions. The result depends on the scene and the
    number alone, not on the process.
    """
    env, renderer = _open_scene(scene)
    rng = np.random.default_rng((scene.seed, number))
    if scene.goal == "random":  # the first reset draws the goal
        env._freeze_rand_vec = False
        env.np_random = np.random.default_rng(np.random.SeedSequence((scene.seed, number)))
    noise = FIXED_GOAL_NOISE if scene.goal == "fixed" else 0.0
    steps = np.arange(0, scene.num_steps + 1, scene.every)
    frames, successes, first = [], [], []
    for kind in KINDS:
        give_up = MAX_STEPS + scene.num_steps
        if kind == KINDS[SUBOPTIMAL]:
            way = first[0] if first[0] > 0 else scene.num_steps
            give_up = max(1, round(rng.uniform(0.3, 0.9) * way))
        states, success, _ = play_episode(
            env, scene.env_id, "uniform" if kind == KINDS[RANDOM] else noise, rng,
            num_steps=scene.num_steps, give_up=give_up,
        )
        env._freeze_rand_vec = True  # the same goal for all three
        for step in steps:
            mujoco.mj_setState(env.model, env.data, states[step], PHYSICS)
            mujoco.mj_forward(env.model, env.data)
            frames.append(renderer.render(env.model, env.data))
        successes.append(success[steps])
        first.append(int(np.argmax(success)) if success.any() else -1)
    return Drawn(np.array(frames).reshape(3, len(steps), *frames[0].shape), np.array(successes),
                 np.array(first))
