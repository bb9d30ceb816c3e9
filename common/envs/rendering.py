"""Pictures of MuJoCo's scenes: without a display, upright RGB, in two qualities.

`paper` is MuJoCo's default. `fast` leaves out the 4096 px shadow map, multisampling and
reflections, and draws meshes with 5 % of their faces: nearly all faces belong to the Sawyer arm's
purely visual meshes, which physics never touches. The model that is simulated is never changed;
only the GL context gets the simplified meshes.
"""

import contextlib
import copy
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from common.cache import cached_arrays
from common.errors import UserError, first_line
from common.system import GL, GL_REMEDY

QUALITIES = ("fast", "paper")
# Meta-World mounts these upside down, so that OpenGL's bottom-up rows are the upright picture.
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
KEPT_FACES = 0.05
WELD = 0.002  # metres
MIN_FACES = 2_000  # smaller meshes, the tasks' objects among them, stay as they are
DEVICES = Path("/dev")
SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast", "software")


def prepare_gl() -> None:
    """Settings of a process that draws; before its first GL context."""
    # Mesa's cache of compiled shaders saves 0.2 s. But it has a thread that runs only on an idle
    # core, also to end: on a busy machine a process that draws then needs seconds to exit.
    os.environ.setdefault("MESA_SHADER_CACHE_DISABLE", "true")
    if not os.environ.get("FURL_ENV_WORKER"):  # environments' workers never load torch
        # Mesa loads its LLVM with global symbols, and torch loads Triton late, which holds another
        # LLVM and crashes if it finds those first. The other way round both work.
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401


@cache
def _gl_context():
    """This process's one GL context: every picture is drawn through it.

    Raises:
        UserError: nothing can draw here.
    """
    prepare_gl()
    try:
        # Its destructor needs it, also when the constructor fails.
        mujoco.GLContext._context = None
        context = mujoco.GLContext(64, 64)
        context.make_current()
    except Exception as error:  # PyOpenGL and MuJoCo raise a dozen kinds when a library is missing
        raise UserError(
            f"headless drawing ({GL.upper()}) does not work here ({first_line(error)}): {GL_REMEDY}"
        ) from error
    return context


def gpu_present() -> bool:
    """Whether this machine has an NVIDIA GPU, whatever can use it."""
    return any(DEVICES.glob("nvidia[0-9]*"))


def gl_info() -> dict[str, str | bool]:
    """Vendor and renderer of the GL in use, and whether it draws in software.

    A GPU that JAX or torch could use while drawing is done in software costs a factor of 50: the
    caller sees it in `software` and `gpu_present`.
    """
    _gl_context().make_current()  # another renderer of this process may have ended its own
    from OpenGL import GL

    vendor, renderer = (GL.glGetString(name).decode() for name in (GL.GL_VENDOR, GL.GL_RENDERER))
    software = any(word in renderer.lower() for word in SOFTWARE_RENDERERS)
    if software and gpu_present():
        print(f"WARNING: this machine has a GPU, but pictures are drawn in software ({renderer}), "
              "50 times slower: check that the driver's EGL is installed (libnvidia-gl)",
              file=sys.stderr)
    return {"vendor": vendor, "renderer": renderer, "software": software,
            "gpu_present": gpu_present()}


class Square(NamedTuple):
    """A part of a picture, pixels."""

    top: int  # its first row, counted from above
    left: int  # its first column
    side: int  # width and height

    def of(self, pictures: np.ndarray) -> np.ndarray:
        """[..., height, width, 3] -> [..., side, side, 3]."""
        rows, columns = (slice(start, start + self.side) for start in (self.top, self.left))
        return pictures[..., rows, columns, :]


class Camera(NamedTuple):
    """What draws a picture, and how."""

    size: int  # width and height of the whole picture, pixels
    id: int = 2  # number
    quality: str = "fast"  # or "paper"
    square: Square | None = None  # the part that is drawn; None: all of it

    @property
    def drawn_size(self) -> int:
        """Width and height of what is drawn, pixels."""
        return self.square.side if self.square else self.size


def check_camera(camera_id: int, names: Sequence[str]) -> None:
    """Raises:
        UserError: there is no such camera among those that have `names`.
    """
    if not 0 <= camera_id < len(names):
        listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
        raise UserError(f"unknown camera {camera_id}; this task has {listed}")


class Renderer:
    """Draws environments of one task, as many as share its model.

    Args:
        model: the task's model.
        camera: size, number and quality of the pictures. A part is drawn at other places of the
            buffer than in the whole picture, and rounded there: 0.02 of 255 apart in the mean.

    Raises:
        UserError: unknown camera or quality, or nothing can draw here.
    """

    def __init__(self, model: mujoco.MjModel, camera: Camera):
        _, camera_id, quality, square = camera
        if quality not in QUALITIES:
            raise UserError(f"unknown quality {quality!r}; allowed: {', '.join(QUALITIES)}")
        names = [model.camera(i).name for i in range(model.ncam)]
        check_camera(camera_id, names)
        self._gl = _gl_context()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = camera_id
        self._bottom_up = names[camera_id] in UPSIDE_DOWN
        size = camera.drawn_size
        drawn = _drawn_model(model, size, quality)
        self._gl.make_current()
        self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        self._scene = mujoco.MjvScene(drawn, maxgeom=2000)
        self._option = mujoco.MjvOption()
        if quality == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._rect = mujoco.MjrRect(0, 0, size, size)
        # Where the whole picture lies, seen from what is drawn; OpenGL counts rows from below.
        top, left, _ = square or Square(0, 0, size)
        below = top if self._bottom_up else camera.size - size - top
        self._whole = mujoco.MjrRect(-left, -below, camera.size, camera.size)
        self._pixels = np.empty((size, size, 3), np.uint8)

    def render(self, model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
        """The picture of `data`, uint8 [drawn_size, drawn_size, 3], a copy.

        `model`: the simulated one.
        """
        mujoco.mj_kinematics(model, data)  # a reset of Meta-World leaves that to the next step
        self._gl.make_current()
        # Each time, not once: other renderers of this process bind their own.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        mujoco.mjv_updateScene(
            model, data, self._option, None, self._camera,
            mujoco.mjtCatBit.mjCAT_ALL.value, self._scene,
        )
        mujoco.mjr_render(self._whole, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
        rows = self._pixels if self._bottom_up else self._pixels[::-1]
        return rows.copy()

    def close(self) -> None:
        self._context.free()


def _drawn_model(model: mujoco.MjModel, size: int, quality: str) -> mujoco.MjModel:
    """A copy for the GL context: sized off-screen buffer, and for `fast` simplified meshes."""
    drawn = copy.copy(model)
    drawn.vis.global_.offwidth = drawn.vis.global_.offheight = size
    if quality == "fast":
        drawn.vis.quality.shadowsize = 0
        drawn.vis.quality.offsamples = 0
        for mesh in range(drawn.nmesh):
            _simplify_mesh(drawn, mesh)
    return drawn


def _simplify_mesh(model: mujoco.MjModel, mesh: int) -> None:
    """Replace a mesh's faces by 5 % of them, in place; the arrays keep their size."""
    num_faces = model.mesh_facenum[mesh]
    if num_faces < MIN_FACES:
        return
    first_vertex, first_face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
    first_normal = model.mesh_normaladr[mesh]
    vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]]
    faces = model.mesh_face[first_face : first_face + num_faces]
    new_vertices, new_faces = _simplified(vertices.copy(), faces.copy())
    if len(new_vertices) > min(len(vertices), model.mesh_normalnum[mesh]):
        return
    count, num_new = len(new_vertices), len(new_faces)
    # Smooth shading: a vertex's normal is the area-weighted mean of its faces' normals.
    corners = new_vertices[new_faces]  # [faces, 3, 3]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(new_vertices)
    for corner in range(3):
        np.add.at(normals, new_faces[:, corner], face_normals)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    model.mesh_vert[first_vertex : first_vertex + count] = new_vertices
    model.mesh_normal[first_normal : first_normal + count] = normals
    model.mesh_face[first_face : first_face + num_new] = new_faces
    model.mesh_facenormal[first_face : first_face + num_new] = new_faces
    model.mesh_facenum[mesh], model.mesh_vertnum[mesh] = num_new, count
    model.mesh_graphadr[mesh] = -1  # its convex hull is not drawn


def mesh_settings(quality: str) -> tuple[float, ...]:
    """What the pictures' meshes depend on."""
    return (KEPT_FACES, WELD, MIN_FACES) if quality == "fast" else ()


def _simplified(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [n, 3] float32 and faces [m, 3] int32 after quadric decimation, cached on disk."""
    settings = repr((KEPT_FACES, WELD)).encode()
    digest = hashlib.sha256(vertices.tobytes() + faces.tobytes() + settings)

    def decimate() -> dict[str, np.ndarray]:
        import fast_simplification

        # Edges collapse only where faces share vertices, and these meshes are full of cracks:
        # vertices within a few millimetres are made one first.
        cells, number = np.unique((vertices / WELD).round(), axis=0, return_inverse=True)
        number = number.reshape(-1)
        welded = np.zeros(cells.shape)
        np.add.at(welded, number, vertices)
        welded /= np.bincount(number)[:, None]
        triangles = number[faces]
        a, b, c = triangles.T
        triangles = triangles[(a != b) & (b != c) & (c != a)]
        points, triangles = fast_simplification.simplify(
            welded.astype(np.float32), triangles.astype(np.int32),
            max(0.0, 1 - KEPT_FACES * len(faces) / len(triangles)), agg=3,
        )
        return {"vertices": points.astype(np.float32), "faces": triangles.astype(np.int32)}

    mesh = cached_arrays("meshes", digest.hexdigest()[:32], decimate)
    return mesh["vertices"], mesh["faces"]
