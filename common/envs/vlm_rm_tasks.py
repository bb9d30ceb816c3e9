"""The environments of the VLM-RM paper (Rocamonde et al., ICLR 2024), appendix C.

CartPole and MountainCar are here, the humanoid's poses in `humanoid.py`.

No episode terminates, which would tell the task: with termination any positive reward solves
CartPole. They are registered with Gymnasium under ids of their own, and evaluated on the originals
where those have a reward.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.continuous_mountain_car import Continuous_MountainCarEnv
from PIL import Image, ImageDraw

from common.envs import humanoid


@dataclass(frozen=True)
class Task:
    """An environment with the paper's prompts (Table 3).

    Attributes:
        prompt, baseline_prompt: goal l and baseline b; None in environments that are not the
            paper's.
        evaluated_on: the id of the environment whose return counts: the original of a changed one.
        vlm: the embedded VLM that knows the pictures, or `toy`, which knows the least.
    """

    prompt: str | None
    baseline_prompt: str | None
    evaluated_on: str
    vlm: str = "toy"


CARTPOLE = ("pole vertically upright on top of the cart", "pole and cart")
MOUNTAIN_CAR = (
    "a car at the peak of the mountain, next to the yellow flag", "a car in the mountain",
)

TASKS = {
    "CartPole-v1": Task(*CARTPOLE, "CartPole-v1"),
    "CartPoleEndless-v1": Task(*CARTPOLE, "CartPole-v1"),
    "MountainCarContinuous-v0": Task(*MOUNTAIN_CAR, "MountainCarContinuous-v0"),
    "MountainCarAbsorbing-v0": Task(*MOUNTAIN_CAR, "MountainCarContinuous-v0"),
    "MountainCarTextured-v0": Task(*MOUNTAIN_CAR, "MountainCarContinuous-v0"),
} | {
    env_id: Task(pose.prompt, humanoid.BASELINE_PROMPT, env_id, vlm="poses")
    for name, pose in humanoid.POSES.items()
    for env_id in (humanoid.env_id(name, look) for look in humanoid.LOOKS)
}


def task_for(env_id: str) -> Task:
    """Of any environment of Gymnasium."""
    return TASKS.get(env_id, Task(None, None, env_id))


class EndlessCartPole(CartPoleEnv):
    """CartPole in which a dropped pole costs a point each step instead of ending the episode.

    The pole swings freely all the way round. At the ends of the track, where the original would
    have ended, the cart is stopped: the pole tips over in the direction of its motion, and while
    the cart is pushed against the end nothing balances the pole. (The authors' code lets the pole
    move as if the cart could go on; then no reward from pictures of the pole tells a policy to stay
    on the track, and the original's episodes end early.)
    """

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        _, speed, angle, spin = self.state
        _, _, dropped, _, info = super().step(action)
        self.steps_beyond_terminated = None  # else the original warns
        state = self.state
        if abs(state[0]) > self.x_threshold:
            end = np.sign(state[0])
            arm = self.length * 4 / 3
            blow = end * max(end * speed, 0) * np.cos(angle) / arm  # inelastic
            fall = self.gravity * np.sin(angle) / arm
            state = np.array([end * self.x_threshold, 0.0, angle + self.tau * spin,
                              spin + self.tau * fall + blow])
        state[2] = (state[2] + np.pi) % (2 * np.pi) - np.pi
        self.state = state
        return state.astype(np.float32), -1.0 if dropped else 1.0, False, False, info


class AbsorbingMountainCar(Continuous_MountainCarEnv):
    """Continuous MountainCar whose car stays at the goal when it has reached it."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._at_goal():
            return np.asarray(self.state, np.float32), 0.0, False, False, {"success": True}
        obs, reward, _, _, info = super().step(action)
        return obs, float(reward), False, False, {**info, "success": self._at_goal()}

    def _at_goal(self) -> bool:
        position, velocity = self.state
        return bool(position >= self.goal_position and velocity >= self.goal_velocity)


class TexturedMountainCar(AbsorbingMountainCar):
    """The same with pictures that look more like a car on a mountain (the paper's Figure 2c).

    Sky, rock, car and flag are drawn here; the authors' repository has pictures of its own.
    """

    WIDTH, HEIGHT = 600, 400

    def render(self) -> np.ndarray:
        """uint8 [400, 600, 3]."""
        image = Image.fromarray(_scenery(self.WIDTH, self.HEIGHT, self.goal_position))
        draw = ImageDraw.Draw(image)
        scale = self.WIDTH / (self.max_position - self.min_position)
        x = (float(self.state[0]) - self.min_position) * scale
        y = self.HEIGHT - self._height(float(self.state[0])) * scale
        slope = math.atan(math.cos(3 * float(self.state[0])) * 1.35)  # of `_height`

        def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
            """From the car's own coordinates, pixels to the right and up, to the picture's."""
            cos, sin = math.cos(slope), math.sin(slope)
            return [(x + a * cos - b * sin, y - a * sin - b * cos) for a, b in points]

        draw.polygon(place([(-26, 8), (26, 8), (27, 18), (-27, 18)]), (190, 30, 35))
        draw.polygon(place([(-15, 18), (14, 18), (8, 30), (-10, 30)]), (150, 20, 25))
        draw.polygon(place([(-12, 19), (-1, 19), (-1, 28), (-8, 28)]), (190, 225, 240))
        draw.polygon(place([(2, 19), (11, 19), (6, 28), (2, 28)]), (190, 225, 240))
        for wheel in (-15, 15):
            [(a, b)] = place([(wheel, 8)])
            draw.ellipse((a - 8, b - 8, a + 8, b + 8), (25, 25, 28))
            draw.ellipse((a - 3, b - 3, a + 3, b + 3), (150, 150, 155))
        return np.asarray(image)


@cache
def _scenery(width: int, height: int, goal: float) -> np.ndarray:
    """Sky, mountain and flag, uint8 [height, width, 3]; the same in every environment."""
    env = Continuous_MountainCarEnv()
    rng = np.random.default_rng(0)
    positions = np.linspace(env.min_position, env.max_position, width)
    ground = env._height(positions) * width / (env.max_position - env.min_position)  # [width]
    rows = np.arange(height, 0, -1)[:, None]  # height above the bottom, pixels
    depth = ground - rows  # below the surface, [height, width]

    def noise(size: int) -> np.ndarray:
        """Smooth noise with lumps of `size` pixels, -1 to 1, [height, width]."""
        coarse = rng.uniform(-1, 1, (height // size + 2, width // size + 2)).astype(np.float32)
        image = Image.fromarray(coarse).resize((coarse.shape[1] * size, coarse.shape[0] * size),
                                               Image.Resampling.BICUBIC)
        return np.asarray(image)[:height, :width]

    sky = np.array([110, 165, 225]) + (height - rows[..., None]) / height * [90, 60, 20]
    sky = sky + np.clip(noise(80) + noise(30) - 0.4, 0, 1)[..., None] * 70  # clouds
    rough = (noise(40) + noise(16) + noise(6) + noise(2)) * 16
    rock = np.array([112, 96, 82]) + rough[..., None]
    grass = np.array([70, 120, 55]) + rough[..., None]
    snow = np.array([235, 238, 245]) + rough[..., None] * 0.3
    skin = np.where((rows > 270)[..., None], snow, grass)
    picture = np.where(depth[..., None] > 14 + rough[..., None] / 4, rock, skin)
    picture = np.where(depth[..., None] > 0, picture, sky)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    flag_x = (goal - env.min_position) / (env.max_position - env.min_position) * width
    foot = height - float(np.interp(goal, positions, ground))
    draw.line((flag_x, foot, flag_x, foot - 50), (60, 45, 30), 3)
    draw.polygon([(flag_x, foot - 50), (flag_x, foot - 32), (flag_x + 27, foot - 41)],
                 (250, 215, 20))
    return np.asarray(image)


def register() -> None:
    """Make the environments known to Gymnasium."""
    for env_id, entry_point, steps in (
        ("CartPoleEndless-v1", EndlessCartPole, 500),
        ("MountainCarAbsorbing-v0", AbsorbingMountainCar, 999),
        ("MountainCarTextured-v0", TexturedMountainCar, 999),
    ):
        gymnasium.register(env_id, entry_point, max_episode_steps=steps)
    humanoid.register()
