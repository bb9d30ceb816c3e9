"""Golden frames in both qualities, and what must hold of any picture.

    python tests/test_rendering.py    # draws the golden frames anew: look at them before a commit
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import system  # noqa: E402
from common.envs.registry import METAWORLD  # noqa: E402
from common.envs.rendering import Camera, Renderer, Square, gl_info  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.vlms import View, view_for  # noqa: E402
from common.vlms.interface import centre_view  # noqa: E402
from tools.shared import golden  # noqa: E402
from tools.shared.golden import SIZE, TASKS, difference, draw, scene  # noqa: E402


@pytest.mark.parametrize("quality", ["fast", "paper"])
@pytest.mark.parametrize("task", TASKS)
def test_golden_frames(task, quality):
    assert difference(draw(task, quality), golden.read(task, quality)) < golden.TOLERANCE


@pytest.mark.parametrize("task", TASKS)
def test_both_qualities_show_the_same(task):
    fast, paper = draw(task, "fast"), draw(task, "paper")
    assert 0.5 < difference(fast, paper) < 12  # shadows, reflections and edges differ
    assert difference(fast, paper) < 0.6 * difference(fast[::-1], paper)


@pytest.mark.parametrize("camera", [1, 2, 3, 4])
@pytest.mark.parametrize("quality", ["fast", "paper"])
def test_pictures_are_upright_and_rgb(camera, quality):
    picture = draw("drawer-open-v3", quality, camera=camera).astype(int)
    red, green, blue = picture.transpose(2, 0, 1)
    robot = (red > 90) & (red > 2.5 * green) & (red > 2.5 * blue)
    assert robot.sum() > 50  # the Sawyer is red
    drawer = (green > 120) & (green > 1.2 * red) & (green > 1.2 * blue)
    assert drawer.sum() > 20  # the drawer is green
    wood = (red > 70) & (red > 1.15 * green) & (green > 1.05 * blue) & (red < 2.2 * blue)
    rows = np.arange(SIZE)[:, None] + np.zeros((1, SIZE))
    assert rows[robot].mean() < rows[wood].mean()  # the arm is above the table top


def test_the_simulated_model_is_not_touched():
    env = scene("drawer-open-v3")
    before = {name: getattr(env.model, name).copy()
              for name in ("mesh_vert", "mesh_face", "mesh_facenum", "mesh_graphadr")}
    renderer = Renderer(env.model, Camera(32))
    renderer.render(env.model, env.data)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(env.model, name), value)
    assert env.model.vis.quality.shadowsize == 4096


def test_one_renderer_draws_all_environments_of_a_task():
    env, other = scene("drawer-open-v3"), scene("drawer-open-v3")
    renderer = Renderer(env.model, Camera(SIZE))
    first = renderer.render(env.model, env.data)
    np.testing.assert_array_equal(renderer.render(other.model, other.data), first)
    other.step(np.array([1, 1, 1, 1], np.float32))
    assert difference(renderer.render(other.model, other.data), first) > 0.01
    np.testing.assert_array_equal(renderer.render(env.model, env.data), first)


def test_renderers_do_not_draw_into_each_other():
    env = scene("drawer-open-v3")
    renderers = [Renderer(env.model, Camera(size)) for size in (SIZE, SIZE, 32)]
    for _ in range(2):
        first, second, small = (r.render(env.model, env.data) for r in renderers)
        np.testing.assert_array_equal(first, second)
        assert first.std() > 10 and small.std() > 10
        env.step(np.array([1, 1, 1, 1], np.float32))
    np.testing.assert_array_equal(
        renderers[0].render(env.model, env.data), renderers[1].render(env.model, env.data)
    )


def test_the_names_of_cameras():
    env = scene("drawer-open-v3")
    assert tuple(env.model.camera(i).name for i in range(env.model.ncam)) == METAWORLD.cameras


# ------------------------------------------------------------------- what a VLM sees of it


def a_vlm(frame_size: int, view: View | None = None) -> SimpleNamespace:
    """As much of a VLM as decides its view."""
    return SimpleNamespace(frame_size=frame_size, view=view)


@pytest.mark.parametrize(("vlm", "view"), [
    (a_vlm(224), View(256, Square(32, 32, 192))),  # LIV, CLIP: the authors' own numbers
    (a_vlm(336), View(384, Square(48, 48, 288))),
    (a_vlm(96, View(20, Square(1, 2, 3))), View(20, Square(1, 2, 3))),
])
def test_the_view_has_the_size_that_the_vlm_needs(vlm, view):
    assert view_for(vlm, METAWORLD) == view


def test_a_view_cuts_its_square_out_of_pictures():
    view = View(12, Square(2, 5, 4))
    frames = np.arange(2 * 12 * 12 * 3).reshape(2, 12, 12, 3)
    np.testing.assert_array_equal(view.crop(frames), frames[:, 2:6, 5:9])
    np.testing.assert_array_equal(view.crop(frames[0]), frames[0, 2:6, 5:9])
    np.testing.assert_array_equal(centre_view(12, 3).crop(frames), frames[:, 3:9, 3:9])


@pytest.mark.parametrize("quality", ["fast", "paper"])
@pytest.mark.parametrize("camera_id", [2, 0])  # mounted upside down, and upright
def test_a_part_is_drawn_as_it_is_in_the_whole_picture(quality, camera_id):
    view = View(120, Square(20, 45, 64))
    env = scene("drawer-open-v3")
    cameras = Camera(120, camera_id, quality), view.camera(camera_id, quality)
    whole, part = (Renderer(env.model, camera).render(env.model, env.data) for camera in cameras)
    assert part.shape == (64, 64, 3)
    assert difference(part, view.crop(whole)) < 0.05
    assert difference(part, whole[21:85, 45:109]) > 4, "a pixel off is another picture"


DRAW_BY_HAND = """
import sys
import mujoco
import numpy as np
from tools.shared.golden import scene

pictures = {}
for task in sys.argv[2:]:
    env = scene(task)
    renderer = mujoco.Renderer(env.model, 256, 256)
    renderer.update_scene(env.data, camera=2)
    pictures[task] = renderer.render()
np.savez(sys.argv[1], **pictures)
"""


@pytest.fixture(scope="module")
def drawn_by_hand(tmp_path_factory) -> dict[str, np.ndarray]:
    """MuJoCo's own pictures, from a process of its own: it chooses its GL when it is imported."""
    file = tmp_path_factory.mktemp("pictures") / "by_hand.npz"
    subprocess.run([sys.executable, "-c", DRAW_BY_HAND, str(file), *TASKS], cwd=ROOT, timeout=300,
                   check=True)
    return dict(np.load(file))


@pytest.mark.parametrize("task", TASKS)
def test_the_view_is_that_of_the_authors(task, drawn_by_hand):
    """MuJoCo's own renderer at 256 px, flipped upright, rows and columns 32 to 224 kept."""
    image = drawn_by_hand[task]
    assert image.shape == (256, 256, 3)
    image = image[::-1]  # this camera is mounted upside down
    by_hand = image[32:224, 32:224]
    view = view_for(a_vlm(224), METAWORLD)
    seen = view.crop(draw(task, "paper", size=view.size)[None])
    assert seen.shape == (1, 192, 192, 3)
    assert difference(seen[0], by_hand) < 0.1
    # A picture that is a pixel off, mirrored, upside down, BGR or not cropped is another one.
    others = [image[33:225, 32:224], image[32:224, 33:225], by_hand[::-1], by_hand[:, ::-1],
              by_hand[..., ::-1], image[:192, :192]]
    assert min(difference(seen[0], other) for other in others) > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": 9}, r"unknown camera 9; this task has 0 \(topview\)"),
        ({"quality": "best"}, "allowed: fast, paper"),
    ],
)
def test_bad_arguments_say_what_is_allowed(options, message):
    env = scene("drawer-open-v3")
    with pytest.raises(UserError, match=message):
        Renderer(env.model, Camera(**({"size": 32} | options)))


def test_the_renderer_in_use_is_known():
    info = gl_info()
    assert info["vendor"] and info["renderer"]
    assert info["software"] == any(w in info["renderer"].lower() for w in ("llvmpipe", "softpipe"))


def test_torch_can_load_its_compiler_after_drawing():
    # Mesa's LLVM and that of torch's compiler in one process: a crash in the wrong order.
    code = "from common.envs.rendering import gl_info; gl_info(); import torchvision"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(system.GL != "egl", reason="macOS draws by CGL")
def test_without_egl_the_error_names_the_command():
    code = "from common.envs.rendering import gl_info; gl_info()"
    environment = os.environ | {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere.json"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                            capture_output=True, text=True, timeout=120)
    assert "UserError: headless drawing (EGL) does not work here" in result.stderr
    assert "apt-get install -y libegl1" in result.stderr


if __name__ == "__main__":
    for name in TASKS:
        for kind in ("fast", "paper"):
            Image.fromarray(draw(name, kind)).save(golden.path(name, kind))
