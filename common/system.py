"""What differs between the systems that this runs on; everything else asks here.

They are Linux on x86-64 and on ARM, and macOS on Apple silicon. What a system lacks is found out
by looking for it, so that tests can hide it. psutil knows of memory and of processes; what a
control group allows is in common/cores.py and common/memory.py.
"""

import fcntl
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ON_MAC = sys.platform == "darwin"

# What draws without a display, by MuJoCo's name.
GL = "cgl" if ON_MAC else "egl"
# Debian's and Ubuntu's packages for it; macOS brings its own.
GL_PACKAGES = () if ON_MAC else (
    "libegl1", "libegl-mesa0", "libgl1", "libgl1-mesa-dri", "libopengl0")
GL_REMEDY = ("CGL needs a GPU, which a virtual machine may lack" if ON_MAC else
             f"run 'apt-get install -y {' '.join(GL_PACKAGES)}' as root")

# The C structure that F_GETLK takes and fills: its layout, and which of its fields is the type.
FLOCK, LOCK_TYPE = ("qqihh", 3) if ON_MAC else ("hhqqi4x", 0)


def choose_gl() -> None:
    """Set what draws for this process and its children, before MuJoCo is imported."""
    os.environ["MUJOCO_GL"] = GL
    if GL == "cgl":
        os.environ.pop("PYOPENGL_PLATFORM", None)
    else:  # MuJoCo is not even imported where these two disagree
        os.environ["PYOPENGL_PLATFORM"] = GL


def python_path(folder: Path) -> str:
    """PYTHONPATH for a process that also finds what is in `folder`, before the user's own."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def usable_cores() -> int:
    """Cores that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_file() -> int:
    """Descriptor of an empty file without a name, to be mapped by several processes."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("furl")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def cpu_description() -> str:
    """What the system tells of its first processor, a line each; empty if nothing."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        pass
    try:
        return subprocess.run(["sysctl", "machdep.cpu"], capture_output=True, text=True).stdout
    except OSError:
        return ""


def is_locked(file: IO) -> bool:
    """Whether another process holds a lock on `file`, open for writing; it is asked, not taken.

    Raises:
        OSError: the file system has no locks.
    """
    whole_file = [0] * 5
    whole_file[LOCK_TYPE] = fcntl.F_WRLCK
    answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, *whole_file))
    return struct.unpack(FLOCK, answer)[LOCK_TYPE] != fcntl.F_UNLCK
