"""A user's own environments, `environments:...`, as tests of the Gymnasium suite need them."""

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
register("OneSize-v0", OneSize)
register("FunctionLine-v0", make_line, kwargs={"end": 2})
