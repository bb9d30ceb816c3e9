"""How well VLMs tell a humanoid's pose: Figures 4a, 4b and 7 of the VLM-RM paper, no training.

    python -m tools.pose_report --vlm ViT-B-32/openai ViT-L-14/laion2b_s32b_b82k
    python -m tools.pose_report --pose Lotus --look original textured camera --vlm ViT-B-32/openai

A small labelled set is drawn: the robot is put into each of eight poses (Rocamonde et al., ICLR
2024, arXiv 2310.12921, Table 1), with noise on its joints, and on the way there from standing. A
state is a goal state if the condition of the pose holds (Table 2, common/envs/humanoid.py). Writes
figures, the rewards as CSV, a sheet of pictures, and prints for each VLM, look and strength of
goal-baseline regularisation the EPIC distance to the labels (0 is best) and the AUC.
"""

import csv
import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import MinLen
from PIL import Image

from common.cli import run_script
from common.envs import humanoid
from common.envs.registry import GYMNASIUM
from common.envs.rendering import prepare_gl
from common.errors import UserError
from common.flags import NotNegativeInt, PositiveInt, Share, check_ranges
from common.vlms import load_vlm, view_for
from tools.shared.folders import writable_folder, written_whole
from tools.shared.measures import (
    auc,
    check_baseline,
    check_finite,
    epic_distance,
    goal_baseline_reward,
)
from tools.shared.plots import plt

NOISE = 12.0  # largest standard deviation of a joint's angle in a state, degrees


@dataclass(frozen=True)
class Args:
    pose: str = "Kneeling"
    """the goal: one of Table 1's, see common/envs/humanoid.py"""
    look: Annotated[tuple[humanoid.Look, ...], MinLen(1)] = ("camera",)
    """original, textured, camera: the pictures of Figure 3"""
    vlm: Annotated[tuple[str, ...], MinLen(1)] = ("ViT-B-32/openai",)
    """clip, liv, or open_clip pairs; the paper's largest is ViT-bigG-14/laion2b_s39b_b160k"""
    vlm_weights: str | None = None
    """local weights file, if there is one VLM"""
    prompt: str | None = None
    """default: Table 3's"""
    baseline_prompt: str | None = None
    """default: Table 3's"""
    alpha: Annotated[tuple[Share, ...], MinLen(1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """strengths of goal-baseline regularisation"""
    samples: PositiveInt = 40
    """states for each of the eight poses"""
    seed: NotNegativeInt = 0
    output: Path = Path("poses")
    """folder"""


@cache  # VLMs may want pictures of one size
def labelled_states(
    pose: str, look: humanoid.Look, size: int, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(pictures uint8 [n, size, size, 3], whether the pose's condition holds, bool [n])."""
    env = humanoid.PosingHumanoid(pose, look, render_mode="rgb_array", width=size, height=size)
    env.reset(seed=0)
    rng = np.random.default_rng(seed)
    pictures, is_goal = [], []
    for posed in humanoid.POSES:
        for i in range(samples):
            share = 1.0 if i % 2 else rng.uniform(0, 1)  # of the way from standing
            # Half of the states have little noise, so that some hold the pose.
            is_goal.append(humanoid.set_pose(env, posed, share, rng, NOISE * rng.uniform() ** 3))
            pictures.append(env.render().copy())
    env.close()
    return np.stack(pictures), np.array(is_goal)


def sheet(pictures: np.ndarray, is_goal: np.ndarray) -> np.ndarray:
    """A page with ten pictures of each pose, goal states with a green border: uint8 [H, W, 3]."""
    rows = pictures.reshape(len(humanoid.POSES), -1, *pictures.shape[1:])[:, :10].copy()
    goals = is_goal.reshape(len(humanoid.POSES), -1)[:, :10]
    framed = rows[goals]
    framed[:, :5] = framed[:, -5:] = framed[:, :, :5] = framed[:, :, -5:] = (0, 170, 60)
    rows[goals] = framed
    return np.concatenate(np.concatenate(rows, axis=1), axis=1)


def main(args: Args) -> None:
    check_ranges(args)
    if args.pose not in humanoid.POSES:
        raise UserError(f"--pose {args.pose} is unknown; these are: {', '.join(humanoid.POSES)}")
    if args.vlm_weights and len(args.vlm) > 1:
        raise UserError(f"--vlm-weights is for one --vlm, not {len(args.vlm)}")
    env_id = humanoid.env_id(args.pose)
    prompts = [GYMNASIUM.prompt_for(env_id, args.prompt),
               GYMNASIUM.baseline_prompt_for(env_id, args.baseline_prompt)]
    prepare_gl()
    vlms = {name: load_vlm(name, weights=args.vlm_weights) for name in args.vlm}
    for vlm in vlms.values():
        check_baseline(*np.asarray(vlm.embed_text(prompts)), prompts, args.alpha)
    writable_folder(args.output)

    cases = [*itertools.product(vlms, args.look)]
    histograms, panels = plt.subplots(1, len(cases), figsize=(3.6 * len(cases), 3.2),
                                      squeeze=False, layout="constrained")
    curves, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    rows, sheets = [], {}
    for (vlm_name, look), panel in zip(cases, panels[0], strict=True):
        name, vlm = f"{vlm_name}, {look}", vlms[vlm_name]
        view = view_for(vlm, GYMNASIUM)
        pictures, is_goal = labelled_states(args.pose, look, view.size, args.samples, args.seed)
        if not is_goal.any():
            raise UserError(f"--samples {args.samples} gave no state that holds {args.pose}: "
                            "draw more")
        sheets[look] = sheet(pictures, is_goal)
        print(f"{look}: {len(pictures)} states, {is_goal.sum()} of them {args.pose}")
        images = np.asarray(vlm.embed_images(view.crop(pictures)))
        text, baseline = np.asarray(vlm.embed_text(prompts))
        distances = []
        for alpha in args.alpha:
            reward = check_finite(goal_baseline_reward(text, baseline, images, alpha),
                                  f"the reward of {name}, alpha {alpha:g},")
            distances.append(epic_distance(reward, is_goal))
            print(f"{name}, alpha {alpha:g}: EPIC distance {distances[-1]:.3f}, "
                  f"AUC {auc(reward[is_goal], reward[~is_goal]):.3f}")
            rows += [(vlm_name, look, alpha, i, int(goal), value)
                     for i, (goal, value) in enumerate(zip(is_goal, reward, strict=True))]
            if alpha == args.alpha[0]:
                panel.set(title=name, xlabel=f"reward, alpha {alpha:g}")
                bins = np.linspace(reward.min(), reward.max(), 40)
                for label, chosen, colour in (("goal", is_goal, "C2"), ("not", ~is_goal, "C7")):
                    panel.hist(reward[chosen], bins, density=True, alpha=0.6, label=label,
                               color=colour)
                    panel.axvline(reward[chosen].mean(), linestyle=":", color=colour)
        axis.plot(args.alpha, distances, "o-", label=name)
    panels[0][0].legend()
    axis.set(title=args.pose, xlabel="alpha", ylabel="EPIC distance to the labels")
    axis.legend()
    with written_whole(args.output, keep=True) as folder:
        for look, picture in sheets.items():
            Image.fromarray(picture).save(folder / f"{look}.png")
        histograms.savefig(folder / "histograms.png", dpi=120)
        curves.savefig(folder / "epic.png", dpi=120)
        with open(folder / "rewards.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("vlm", "look", "alpha", "state", "is_goal", "reward"), *rows])
    print(f"wrote {args.output}/histograms.png, epic.png, rewards.csv and pictures")


if __name__ == "__main__":
    run_script(main, Args)
