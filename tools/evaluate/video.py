"""The video of evaluation episodes: the instruction, the scene, and the reward as it unfolds."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.envs.registry import suite_for
from common.errors import UserError
from common.evaluate import Evaluator, write_video
from tools.evaluate.trained import Trained

SIZE = 384  # pixels, of the picture in the video
CURVE_HEIGHT = 136
WHITE, INK, GREY, BLUE, GREEN = "#ffffff", "#1f2933", "#8a94a0", "#1565c0", "#2e7d32"


def film(
    trained: Trained, evaluator: Evaluator, count: int, folder: Path, *, env_id: str, **where: Any
) -> tuple[list[str], str]:
    """Write the first episodes that were played as videos; (their names, what the curve is).

    Args:
        evaluator: what has played them, on `env_id`.
        where: `goal` and `seed` of the episodes.
    """
    suite = suite_for(env_id)
    actions = np.array(evaluator.actions)[:, :count]
    _, frames, success, rewards = trained.play_again(actions, SIZE, env_id=env_id, **where)
    label = "sparse reward" if suite.sparse_reward else "reward of the environment"
    own = env_id == suite.evaluated_on(trained.args.env_id)
    if trained.has_vlm:
        try:
            vlm = trained.vlm
        except UserError as error:
            print(f"note: the video shows the {label}: {error}")
        else:
            # As in training, where the environment may be drawn in another way.
            view = trained.view_of(vlm)
            seen = view.crop(trained.play_again(
                actions, view.size, env_id=trained.args.env_id if own else env_id, **where
            ).frames)
            reward_of = trained.vlm_reward(vlm)
            found = np.stack([reward_of(vlm.embed_images(seen[:, i])) for i in range(count)], 1)
            if np.isfinite(found).all():
                rewards, label = found, f"VLM reward of this run ({vlm.name})"
            else:
                print(f"note: the video shows the {label}: the VLM reward is not finite, or it was "
                      "learned and is kept in checkpoints only")
    if trained.has_vlm and own:
        title = prompt_of(trained.config)
    else:
        try:
            title = suite.prompt_for(env_id, None)
        except UserError:  # it has none
            title = env_id
        if trained.has_vlm:
            label += f": {prompt_of(trained.config)}"
    names = []
    repeat = trained.evaluation["action_repeat"]
    for i, length in enumerate(evaluator.episodes["length"][:count].astype(int)):
        names.append(f"episode_{i}.mp4")
        write_video(folder / names[-1], compose(
            frames[:length, i], rewards[:length, i], success[:length, i], title, label,
            every=1 if repeat > 1 else 2, steps_per_frame=repeat,
        ))
    return names, label


def prompt_of(config: dict) -> str:
    """What the VLM was asked; a copied script may have several prompts, or another name for it."""
    prompt = config.get("prompt") or config["args"]["env_id"]
    return " / ".join(map(str, prompt)) if isinstance(prompt, list) else str(prompt)


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def compose(
    frames: np.ndarray, reward: np.ndarray, success: np.ndarray, title: str, label: str,
    every: int, steps_per_frame: int = 1,
) -> list[np.ndarray]:
    """The video's pictures: instruction above, scene, reward so far below.

    Args:
        frames: uint8 [T, size, size, 3]; reward: [T]; success: [T] bool.
        title: the instruction; label: what the curve is.
        every: of how many frames one is shown.
        steps_per_frame: environment steps between two frames.
    """
    size = frames.shape[1]
    lines = textwrap.wrap(title, (size - 24) // 9)  # a letter of 17 px is 8 to 9 wide
    top = 18 + 22 * len(lines)
    height = -(-(top + size + CURVE_HEIGHT) // 8) * 8  # what H.264's blocks need
    low, high = float(reward.min()), float(reward.max())
    high = high if high - low > 1e-6 else low + 1  # a constant runs along the lower line
    left, right, upper, lower = 52, size - 14, top + size + 34, top + size + CURVE_HEIGHT - 18
    x = np.linspace(left, right, len(reward))
    y = lower - (reward - low) / (high - low) * (lower - upper)
    base = Image.new("RGB", (size, height), WHITE)
    draw = ImageDraw.Draw(base)
    for i, line in enumerate(lines):
        draw.text((12, 10 + 22 * i), line, INK, font(17))
    draw.text((12, upper - 26), label, INK, font(13))
    for value, position in ((high, upper), (low, lower)):
        draw.line((left, position, right, position), "#e3e7eb")
        draw.text((left - 6, position), f"{value:.2f}", GREY, font(12), anchor="rm")
    shown = [*range(0, len(frames), every)]
    if shown[-1] != len(frames) - 1:
        shown.append(len(frames) - 1)
    pictures = []
    for t in shown:
        picture = base.copy()
        picture.paste(Image.fromarray(frames[t]), (0, top))
        draw = ImageDraw.Draw(picture)
        now = f"step {(t + 1) * steps_per_frame}"
        draw.text((right, upper - 26), now, GREY, font(13), anchor="ra")
        if success[t]:
            draw.rectangle((size - 92, top + 8, size - 10, top + 30), GREEN)
            draw.text((size - 51, top + 19), "success", WHITE, font(14), anchor="mm")
        if t:
            points = [(float(a), float(b)) for a, b in zip(x[: t + 1], y[: t + 1], strict=True)]
            draw.line(points, BLUE, 2, joint="curve")
        draw.circle((float(x[t]), float(y[t])), 4, BLUE)
        pictures.append(np.asarray(picture))
    return pictures
