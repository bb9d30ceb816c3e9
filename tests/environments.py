"""A user's own environments, `environments:...`, as tests of the Gymnasium suite need them."""

import random
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv


class Line(gymnasium.Env):
    """Steps along a line from 0; at `end` the episode terminates with the reward 1.

    The observation is a dictionary, which has to be flattened. Beside the position it holds the
    number of the episode, so that tests can tell where one ends.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Dict({
        "episode": gymnasium.spaces.Box(0, np.inf, (1,), np.float32),
        "position": gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32),
    })

    def __init__(self, render_mode: str | None = None, discrete: bool = True, end: int = 3):
        self.render_mode, self.end, self.episode = render_mode, end, 0
        self.action_space = (
            gymnasium.spaces.Discrete(2) if discrete
            else gymnasium.spaces.Box(-2, 2, (1,), np.float32)
        )

    def observe(self) -> dict[str, np.ndarray]:
        return {"episode": np.float32([self.episode]), "position": np.float32([self.position])}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.position = 0.0
        self.episode += 1
        return self.observe(), {}

    def step(self, action: Any):
        self.position += float(np.reshape(action, ()))
        done = self.position >= self.end
        return self.observe(), float(done), done, False, {}

    def render(self) -> np.ndarray:
        """Its position is the shade of grey."""
        return np.full((40, 60, 3), int(np.clip(self.position, 0, 3) * 80), np.uint8)


class Blind(Line):
    metadata: ClassVar = {"render_modes": []}


class Undrawable(Line):
    """Says that it can be drawn, but cannot be asked for it."""

    def __init__(self):
        super().__init__()


class Unbounded(Line):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Broken(gymnasium.Env):
    """Does one thing that Gymnasium's contract does not allow, from the step `since` on."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None, since: int = 0, **fault: Any):
        self.render_mode, self.since, self.fault, self.steps = render_mode, since, fault, 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("action_space", "observation_space"):
            return super().__getattribute__("fault").get(name, super().__getattribute__(name))
        return super().__getattribute__(name)

    def now(self, name: str, right: Any) -> Any:
        return self.fault[name] if name in self.fault and self.steps >= self.since else right

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return self.now("reset", (self.now("obs", np.zeros(3)), {}))

    def step(self, action: np.ndarray):
        self.steps += 1
        obs = self.now("obs", np.zeros(3))
        return self.now("step", (obs, self.now("reward", 1.0), self.now("terminated", False), False,
                                 self.now("info", {})))

    def render(self) -> Any:
        return self.now("picture", np.zeros((8, 8, 3), np.uint8))


class TakesNoSeed(Broken):
    def reset(self):
        return np.zeros(3), {}


class Global(Broken):
    """Draws from the global generators."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        return np.array([random.random(), np.random.rand(), 0.0]), {}  # noqa: NPY002

    def step(self, action: np.ndarray):
        obs = np.array([random.gauss(), np.random.rand(), 0.0])  # noqa: NPY002
        return obs, 0.0, False, False, {}


class OneSize(ReacherEnv):
    """MuJoCo's, whose pictures have a size of their own."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode=render_mode)


def make_line(*, end: int, render_mode: str | None = None) -> gymnasium.Env:
    """A function in place of a class; it cannot be called without what it is registered with."""
    return Line(render_mode, end=end)


def register(env_id: str, entry_point: Callable[..., gymnasium.Env], **options: Any) -> None:
    gymnasium.register(env_id, entry_point, **options)


register("Line-v0", Line, max_episode_steps=5)
register("ContinuousLine-v0", Line, max_episode_steps=5, kwargs={"discrete": False})
register("Blind-v0", Blind)
register("Undrawable-v0", Undrawable)
register("Unbounded-v0", Unbounded)
register("TakesNoSeed-v0", TakesNoSeed)
register("Global-v0", Global, max_episode_steps=5)
register("StackedPendulum-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=200,
         additional_wrappers=(gymnasium.wrappers.FrameStackObservation.wrapper_spec(stack_size=3),))
nan = np.full(3, np.nan)
for name, fault in {
    "OnlyObs": {"reset": np.zeros(3)}, "PairOfNumbers": {"reset": np.zeros(2)},
    "FourParts": {"step": (np.zeros(3), 1.0, False, {})}, "NoInfo": {"info": None},
    "Scalar": {"obs": 0.5}, "Short": {"obs": np.zeros(1)}, "Ragged": {"obs": [[1], [2, 3]]},
    "NoObs": {"obs": None}, "Words": {"obs": ["a", "b", "c"]}, "NaN": {"obs": nan},
    "Huge": {"obs": np.array([0, 0, 1e300])}, "LateNaN": {"obs": nan, "since": 30},
    "NaNReward": {"reward": np.nan}, "NoReward": {"reward": None}, "Rewards": {"reward": nan},
    "LateNaNReward": {"reward": -np.inf, "since": 30}, "NoEnd": {"terminated": None},
    "IsSuccess": {"info": {"is_success": np.True_}, "since": 2},
    "NaNSuccess": {"info": {"success": np.nan}},
    "FloatPicture": {"picture": np.zeros((8, 8, 3))}, "ListPicture": {"picture": [[0]]},
    "NoPicture": {"picture": None}, "ChannelsFirst": {"picture": np.zeros((3, 8, 8), np.uint8)},
    "EmptyPicture": {"picture": np.zeros((0, 8, 3), np.uint8)},
    "GreyPicture": {"picture": np.full((8, 8), 70, np.uint8)},
    "RGBA": {"picture": np.full((8, 8, 4), (70, 80, 90, 255), np.uint8)},
    "Whole": {"action_space": gymnasium.spaces.Box(0, 10, (2,), np.int64)},
    "Point": {"action_space": gymnasium.spaces.Box(np.float32([0, 1]), np.float32([1, 1]))},
    "FarApart": {"action_space": gymnasium.spaces.Box(np.float32([1e9]), np.float32([1e9 + 64]))},
    "NoActions": {"action_space": gymnasium.spaces.Box(-1, 1, (0,), np.float32)},
    "NoSpace": {"action_space": None},
    "Graph": {"observation_space": gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(2))},
}.items():
    register(f"{name}-v0", Broken, max_episode_steps=60, kwargs=fault)
register("OneSize-v0", OneSize)
register("FunctionLine-v0", make_line, kwargs={"end": 2})
