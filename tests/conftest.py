"""Tests run from any folder, two files at a time, and keep caches out of the home folder's way."""

import contextlib
import gc
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Two test processes share two cores: one thread and one worker process for whatever they start.
# (tests/test_envs.py asks for several workers where they matter.)
os.environ.setdefault("FURL_NUM_CORES", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Many tests compile the same programs: all processes of a session share a folder for them, which
# the first one makes. With a limit JAX locks it: no process reads what another has half written.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="furl-tests-")  # until the tests end
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# These networks are tiny: most of the time would go into XLA's optimizations.
# (tests/test_end_to_end.py compiles as a user's runs do.)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# What a shell starts in the background ignores Ctrl-C, and so would the script. (Not by preexec_fn:
# forking a process that holds JAX's threads may hang.)
HEED_SIGNALS = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


# The longest files, and long ones that the alphabet would put last.
FIRST = ("test_end_to_end.py", "test_copying.py", "test_system.py", "test_trace.py", "test_vlm.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with `FIRST`: what is left for the end is short, and no process waits for the other."""
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_sessionfinish() -> None:
    """Free the GL contexts of what no test has closed: destructors at the interpreter's end, when
    MuJoCo has ended EGL, would print tracebacks above pytest's last lines."""
    if mujoco := sys.modules.get("mujoco"):
        for context in [x for x in gc.get_objects() if type(x) is mujoco.GLContext]:
            with contextlib.suppress(Exception):
                context.free()


@pytest.fixture(scope="session", autouse=True)
def workers_start_quickly():
    """Of the tests' own processes; elsewhere, and with `real_workers`, they start as they do for
    users."""
    from forked_workers import Worker

    from common import system
    from common.envs import workers

    if not system.ON_MAC:  # whose libraries cannot be forked
        workers.subprocess = types.SimpleNamespace(**vars(subprocess) | {"Popen": Worker})


@pytest.fixture
def real_workers(monkeypatch):
    from common.envs import workers

    monkeypatch.setattr(workers, "subprocess", subprocess)


def paper_scripts() -> list[str]:
    """The names of the scripts whose commands stand in docs/paper.md, sorted, without `.py`.

    They are what the repository offers. Other scripts in its root are a user's own, and no test
    looks at them.
    """
    text = (ROOT / "docs/paper.md").read_text()
    return sorted(set(re.findall(r"\bpython (\w+)\.py\b", text)))


@pytest.fixture
def refused(monkeypatch, capfd):
    """`refused(module, flags, message)`: its command line ends with one line and status 2."""
    from common.cli import run_script

    def check(module, flags: list[str], message: str) -> None:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
        with pytest.raises(SystemExit) as stop:
            run_script(module.main, module.Args)
        assert stop.value.code == 2
        errors = capfd.readouterr().err
        assert message in errors and len(errors.strip().splitlines()) == 1, errors

    return check
