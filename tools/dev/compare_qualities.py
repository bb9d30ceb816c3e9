"""How far the two qualities of pictures are apart, task by task, with pictures of MT10.

    python -m tools.dev.compare_qualities      # writes docs/drawing.md and docs/drawing.png

Three kinds: `paper`; `fast` with all faces of the meshes, which tells the lighting's part from the
simplification's; and `fast`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from common.envs import rendering
from common.envs.metaworld_suite import make_env
from common.envs.metaworld_tasks import ENV_IDS, MT10, expert_action, expert_policy
from tools.shared.golden import difference

KINDS = ("paper", "fast, all faces", "fast")
TIMES = (0, 20, 40, 60)  # steps of the expert at which pictures are taken


@dataclass(frozen=True)
class Args:
    size: int = 112
    """width and height of the pictures, pixels"""
    output: Path = Path("docs/drawing.md")
    """table to write; the pictures go beside it as .png"""


def draw_task(env_id: str, size: int) -> np.ndarray:
    """The same moments of one expert episode in each kind, uint8 [kinds, times, size, size, 3]."""
    env = make_env(env_id, seed=0, index=0, goal="fixed", show_goal=True)
    policy = expert_policy(env_id)
    renderers, min_faces = [], rendering.MIN_FACES
    for kind in KINDS:
        rendering.MIN_FACES = 10**9 if kind == "fast, all faces" else min_faces
        camera = rendering.Camera(size, quality=kind.split(",")[0])
        renderers.append(rendering.Renderer(env.model, camera))
    obs, _ = env.reset()
    pictures = []
    for step in range(max(TIMES) + 1):
        if step in TIMES:
            pictures.append([renderer.render(env.model, env.data) for renderer in renderers])
        obs, *_ = env.step(expert_action(policy, obs))
    for renderer in renderers:
        renderer.close()
    return np.swapaxes(np.array(pictures), 0, 1)


def main(args: Args) -> None:
    rows, sheet = [], []
    for env_id in ENV_IDS:
        paper, all_faces, fast = pictures = draw_task(env_id, args.size)
        rows.append((env_id, difference(fast, paper), difference(all_faces, paper),
                     difference(fast, all_faces)))
        print("{:32} {:6.2f} {:6.2f} {:6.2f}".format(*rows[-1]), flush=True)
        if env_id in MT10:
            sheet.append(np.concatenate(pictures[:, 2], axis=1))
    half = len(sheet) // 2
    columns = [np.concatenate(part) for part in (sheet[:half], sheet[half:])]
    Image.fromarray(np.concatenate(columns, axis=1)).save(args.output.with_suffix(".png"))
    differences = np.array([row[1:] for row in rows])
    lines = [
        "# Drawing: `fast` against `paper`", "",
        "`--quality fast` draws no shadows, multisampling and reflections, and 5 % of the faces of "
        f"meshes. It differs from `paper` by {differences[:, 0].mean():.0f} of 255 in the mean, "
        "nearly all of it lighting.", "",
        f"`python -m tools.dev.compare_qualities`: mean absolute difference, in steps of 1/255, of "
        f"{len(TIMES)} moments of an expert's episode, {args.size} px, camera 2, over the "
        f"{len(rows)} tasks. *Lighting*: shadow map, multisampling and reflections left out, all "
        "faces kept; *simplification*: meshes with 5 % of their faces, the lighting the same.", "",
        f"![MT10 in {', '.join(KINDS)}]({args.output.with_suffix('.png').name})", "",
        f"MT10; of each task, from left to right: {'; '.join(KINDS)}.", "",
        "| | fast against paper | lighting alone | simplification alone |",
        "| --- | --- | --- | --- |",
        *("| {} | {:.2f} | {:.2f} | {:.2f} |".format(name, *over_tasks(differences, axis=0))
          for name, over_tasks in (("mean", np.mean), ("least", np.min), ("greatest", np.max))),
    ]
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
