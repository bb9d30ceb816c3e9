"""What every script is measured with: environments, frozen encoders, replay, logs, checkpoints.

Importing it makes the process-wide settings that must stand before JAX, torch or MuJoCo load, and
makes up for surroundings in which Python itself would fail: closed standard streams, and locales
that are not UTF-8.
"""

import locale
import os
import sys

from common.system import choose_gl

# Torch's OpenMP threads would spin after each call and take the cores from XLA and the workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# JAX and torch share one GPU: neither may take all of its memory at start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
choose_gl()  # whatever is set


def open_standard_streams() -> None:
    """Where one is closed (`<&-`, `>&-`), the next file to be opened would be taken for it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))


def use_utf8() -> None:
    """Files are UTF-8 in every locale; what a terminal cannot show becomes a question mark."""
    if locale.getencoding().lower() not in ("utf-8", "utf8"):
        for name in ("C.UTF-8", "C.utf8", "en_US.UTF-8"):
            try:
                locale.setlocale(locale.LC_CTYPE, name)  # which `open` goes by
                break
            except locale.Error:
                continue
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(
                stream, "reconfigure"):
            stream.reconfigure(errors="replace")


open_standard_streams()
use_utf8()
