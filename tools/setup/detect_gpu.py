"""Print 1 if this machine can run JAX's CUDA 13 build, else 0. Any Python 3, no packages needed.

It asks the driver itself: a GPU without a driver library (a container with too few rights) or with
an old driver must not get the CUDA build, which would crash or fail there.
"""

import ctypes
import os
import sys

CUDA = 13000  # what cuDriverGetVersion answers from driver 580 on


def problem() -> str:
    """Why CUDA 13 cannot be used; empty if it can."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number))
        if status or number.value == 0:
            return f"its driver finds no usable GPU (CUDA error {status})"
        status = cuda.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return "its driver library libcuda.so.1 cannot be loaded"
    if status or number.value < CUDA:
        return "its driver is too old for CUDA 13 (580 or newer is needed)"
    return ""


if __name__ == "__main__":
    reason = problem()
    if reason and os.path.exists("/dev/nvidia0"):
        print(f"warning: there is an NVIDIA GPU, but {reason}: using the CPU", file=sys.stderr)
    print(0 if reason else 1)
