"""A stand-in for macOS: hides from Python what it lacks, and lets MuJoCo draw by its CGL.

tests/test_system.py puts it, as sitecustomize.py, before all processes of a run. The numbers, and
what OpenGL draws, stay this machine's: only the paths through our code are those of a Mac.
"""

import builtins
import io
import os
import platform
import sys
import types

del os.memfd_create, os.sched_getaffinity
real_open, real_system = open, platform.system


def caller() -> str:
    """The module that has called what calls this."""
    return sys._getframe(2).f_globals["__name__"]


def open_but_linux(file, *args, **kwargs):
    ours = not caller().startswith("OpenGL.")  # which is part of the disguise
    if ours and str(file).startswith(("/proc", "/sys/fs/cgroup")):  # JAX looks for devices in /sys
        raise FileNotFoundError(2, "no such file on a Mac", file)
    return real_open(file, *args, **kwargs)


class NoEGL:
    """In sys.meta_path: our code, and what it calls, cannot import EGL."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "mujoco.egl":
            raise ImportError("there is no EGL on a Mac")


class CGL(types.ModuleType):
    """Apple's CGL, which is EGL in disguise."""

    @property
    def GLContext(self):
        sys.meta_path.remove(NoEGL)
        import mujoco.egl

        sys.meta_path.insert(0, NoEGL)
        return mujoco.egl.GLContext


def system_for_mujoco():
    return "Darwin" if caller() == "mujoco.gl_context" else real_system()


builtins.open = io.open = open_but_linux
sys.meta_path.insert(0, NoEGL)
sys.modules["mujoco.cgl"] = CGL("mujoco.cgl")
platform.system = system_for_mujoco

from common import system  # noqa: E402 - a sitecustomize sees to it before all others

system.GL = "cgl"
system.choose_gl()
