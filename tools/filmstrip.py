"""One picture of what runs have learned: where an episode ends, before training and after it.

    python -m tools.filmstrip runs/grids/plus/plus/*/0 --output tasks.png

A column for each run: above the last frame of an episode of the first policy that it kept, below
that of its newest checkpoint. A green border means success at that step. The episode is one of the
run's own evaluations.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw

from common.cli import run_script
from common.envs.registry import suite_for
from common.errors import UserError
from common.evaluate import EVAL_SEED_OFFSET
from common.run_folder import kept_policies
from common.vlms.interface import centre_view
from tools.evaluate.trained import Trained, open_run
from tools.evaluate.video import GREEN, INK, WHITE, font

SIZE, GAP, TOP, LEFT = 150, 8, 26, 84  # pixels: a frame, between frames, titles, steps


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, one column each
    output: Path = Path("filmstrip.png")  # the picture to write
    run_code: bool = False  # execute the scripts in the folders: only if you trust them


def last_frame(trained: Trained) -> tuple[np.ndarray, bool]:
    """The last frame of an evaluation episode, uint8 [SIZE, SIZE, 3], and whether it succeeds."""
    env_id, goal = trained.args.env_id, getattr(trained.args, "goal", "fixed")
    seed = trained.args.seed + (0 if suite_for(env_id).all_same(goal) else EVAL_SEED_OFFSET)
    where = {"env_id": env_id, "goal": goal, "seed": seed}
    with closing(trained.evaluator(num_episodes=1, **where)) as evaluator:
        evaluator(trained.policy)
    # What happens is in the middle of a picture where a VLM is shown no border either.
    size, margin = (2 * SIZE, SIZE // 2) if suite_for(env_id).crops_border else (SIZE, 0)
    view = centre_view(size, margin)
    again = trained.play_again(np.array(evaluator.actions), size, **where)
    return view.crop(again.frames[-1, 0]), bool(evaluator.episodes["success_at_end"][0])


def compose(columns: list[tuple[str, list[tuple[int, np.ndarray, bool]]]]) -> Image.Image:
    """The picture of (title, (environment steps, frame, success) of each row) for each column."""
    cell = SIZE + GAP
    picture = Image.new("RGB", (LEFT + cell * len(columns), TOP + cell * 2), WHITE)
    draw = ImageDraw.Draw(picture)
    for i, (title, rows) in enumerate(columns):
        left = LEFT + cell * i
        draw.text((left + SIZE / 2, TOP / 2), title, INK, font(14), anchor="mm")
        for j, (_, frame, success) in enumerate(rows):
            top = TOP + cell * j
            picture.paste(Image.fromarray(frame), (left, top))
            if success:
                draw.rectangle((left, top, left + SIZE - 1, top + SIZE - 1), outline=GREEN, width=4)
    for j, when in enumerate(("before", "after")):
        steps = sorted({rows[j][0] for _, rows in columns})
        text = f"{when}:\n{steps[0]:,}\nsteps" if len(steps) == 1 else when
        draw.multiline_text((4, TOP + cell * j + SIZE / 2), text, INK, font(14), anchor="lm")
    return picture


def main(args: Args) -> None:
    if not args.runs:
        raise UserError("give run folders")
    suffixes = Image.registered_extensions()
    if args.output.suffix.lower() not in suffixes or not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output} must be a picture's name, such as tasks.png, in a "
                        "folder that exists")
    columns = []
    for folder in args.runs:
        kept = kept_policies(folder)
        if not kept:
            raise UserError(f"{folder} has no policies/: it is no run, or older than these, or has "
                            "not evaluated yet")
        rows = []
        for env_steps in (min(kept), None):
            trained = open_run(folder, env_steps, args.run_code)
            rows.append((trained.env_steps, *last_frame(trained)))
        columns.append((trained.args.env_id.removesuffix("-v3"), rows))
    try:
        compose(columns).save(args.output)
    except (OSError, ValueError) as error:  # a full disk, or a kind that cannot be written
        raise UserError(f"--output {args.output} cannot be written: {error}") from None
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_script(main, Args)
