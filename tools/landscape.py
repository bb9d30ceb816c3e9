"""The VLM's reward over one number of the state: Figure 2 of the VLM-RM paper.

    python -m tools.landscape --env-id CartPole-v1
    python -m tools.landscape --env-id MountainCarAbsorbing-v0 MountainCarTextured-v0 --vlm clip

For each environment the state is set directly, drawn and scored (Rocamonde et al., ICLR 2024,
arXiv 2310.12921, section 4.2), for several strengths of goal-baseline regularisation. What is not
on the axis, such as the cart's place, is drawn at random `--repeats` times; lines are means. Writes
a PNG, a CSV and prints how well the reward leads to the goal.
"""

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import MinLen

from common.cli import run_script
from common.envs.gymnasium_suite import make_env, square
from common.envs.registry import GYMNASIUM
from common.errors import UserError
from common.flags import NotNegativeInt, PositiveInt, Share, check_ranges
from common.vlms import load_vlm, view_for
from tools.shared.folders import writable_folder, written_whole
from tools.shared.measures import check_baseline, check_finite, goal_baseline_reward, spearman
from tools.shared.plots import plt


@dataclass(frozen=True)
class Axis:
    """A number of the state over which the reward is drawn (Figure 2).

    Attributes:
        name: what it is, with its unit.
        values: [n].
        goal: the value that the task is about.
        near: distance from it within which a policy works.
        state: (a value, a generator for the rest of the state) -> the environment's `state`.
    """

    name: str
    values: np.ndarray
    goal: float
    near: float
    state: Callable[[float, np.random.Generator], np.ndarray]


POLE_ANGLE = Axis(
    "angle of the pole, degrees", np.linspace(-180, 180, 121), goal=0, near=12,
    state=lambda degrees, rng: np.array([rng.uniform(-2, 2), 0, np.deg2rad(degrees), 0]),
)
CAR_POSITION = Axis(
    "position of the car", np.linspace(-1.2, 0.6, 91), goal=0.45, near=0.5,
    state=lambda position, rng: np.array([position, 0]),
)
AXES = {  # by environment
    "CartPole-v1": POLE_ANGLE,
    "CartPoleEndless-v1": POLE_ANGLE,
    "MountainCarContinuous-v0": CAR_POSITION,
    "MountainCarAbsorbing-v0": CAR_POSITION,
    "MountainCarTextured-v0": CAR_POSITION,
}


@dataclass(frozen=True)
class Args:
    env_id: Annotated[tuple[str, ...], MinLen(1)] = ("CartPole-v1",)
    """environments, a panel each"""
    vlm: str = "toy"
    """toy, clip, or an open_clip pair such as ViT-B-32/openai"""
    vlm_weights: str | None = None
    """local weights file for --vlm"""
    prompt: str | None = None
    """default: Table 3's"""
    baseline_prompt: str | None = None
    """default: Table 3's"""
    alpha: Annotated[tuple[Share, ...], MinLen(1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """strengths of goal-baseline regularisation, a line each"""
    repeats: PositiveInt = 8
    """states for each value on the axis"""
    seed: NotNegativeInt = 0
    """of what is not on the axis"""
    output: Path = Path("landscapes")
    """folder"""


def pictures(env_id: str, axis: Axis, size: int, args: Args) -> np.ndarray:
    """uint8 [values, repeats, size, size, 3]."""
    rng = np.random.default_rng(args.seed)
    env = make_env(env_id, seed=args.seed, index=0, frame_size=size)
    drawn = []
    for value in axis.values:
        for _ in range(args.repeats):
            env.unwrapped.state = axis.state(value, rng)
            drawn.append(square(env.render(), size))
    env.close()
    return np.stack(drawn).reshape(len(axis.values), args.repeats, size, size, 3)


def main(args: Args) -> None:
    check_ranges(args)
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame opens no window
    axes, prompts = [], []
    for env_id in args.env_id:
        axis = AXES.get(GYMNASIUM.resolve_env_id(env_id))
        if axis is None:
            raise UserError(f"{env_id} has no axis to draw over; these have: {', '.join(AXES)}")
        axes.append(axis)
        prompts.append([GYMNASIUM.prompt_for(env_id, args.prompt),
                        GYMNASIUM.baseline_prompt_for(env_id, args.baseline_prompt)])
    vlm = load_vlm(args.vlm, weights=args.vlm_weights)
    for texts in prompts:
        check_baseline(*np.asarray(vlm.embed_text(texts)), texts, args.alpha)
    view = view_for(vlm, GYMNASIUM)
    writable_folder(args.output)

    figure, panels = plt.subplots(1, len(axes), figsize=(4.5 * len(axes), 3.6), squeeze=False,
                                  layout="constrained")
    rows = []
    for env_id, axis, texts, panel in zip(args.env_id, axes, prompts, panels[0], strict=True):
        frames = pictures(env_id, axis, view.size, args)
        images = np.asarray(vlm.embed_images(view.crop(frames.reshape(-1, *frames.shape[2:]))))
        text, baseline = np.asarray(vlm.embed_text(texts))
        for alpha in args.alpha:
            reward = check_finite(goal_baseline_reward(text, baseline, images, alpha),
                                  f"the reward of {env_id}, alpha {alpha:g},")
            mean = reward.reshape(frames.shape[:2]).mean(1)
            best = axis.values[mean.argmax()]
            nearness = -np.abs(axis.values - axis.goal).repeat(args.repeats)
            near = -nearness <= axis.near
            leads, leads_near = spearman(reward, nearness), spearman(reward[near], nearness[near])
            print(f"{env_id}, alpha {alpha:g}: highest at {axis.name} {best:.3g} (goal "
                  f"{axis.goal:g}); Spearman with nearness {leads:.2f}, within {axis.near:g} of "
                  f"the goal {leads_near:.2f}")
            rows += [(env_id, alpha, value, r) for value, r in zip(axis.values, mean, strict=True)]
            scaled = (mean - mean.min()) / max(np.ptp(mean), 1e-12)  # as in the paper's figure
            panel.plot(axis.values, scaled, label=f"{alpha:g}")
        panel.axvline(axis.goal, color="grey", linestyle=":")
        panel.set(title=env_id, xlabel=axis.name, ylabel="reward, scaled to 0 to 1")
    panels[0][0].legend(title="alpha")
    with written_whole(args.output, keep=True) as folder:
        figure.savefig(folder / "landscape.png", dpi=120)
        with open(folder / "landscape.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("env_id", "alpha", "value", "reward"), *rows])
    print(f"wrote {args.output}/landscape.png and landscape.csv")


if __name__ == "__main__":
    run_script(main, Args)
