"""What a result depends on beside its settings: the commit and the installed packages."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

OF_ANOTHER_REPOSITORY = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY",
                         "GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_PREFIX"}
PACKAGES = ("metaworld", "mujoco", "gymnasium", "jax", "jaxlib", "flax", "optax", "torch", "numpy")


def git_commit() -> str:
    """The checked-out commit; 'unknown' outside git.

    With '+dirty' when tracked code or weights differ, or when code that runs here is not tracked,
    e.g. a new copy of a script.
    """
    # GIT_DIR and the like, which a hook of another repository sets, would name that one's commit.
    environment = {key: x for key, x in os.environ.items() if key not in OF_ANOTHER_REPOSITORY}
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=folder, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    files = [Path(file).resolve() for module in list(sys.modules.values())
             if (file := getattr(module, "__file__", None))]
    installed = Path(sys.prefix).resolve()
    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        code = [str(x) for x in files if x.is_relative_to(root) and not x.is_relative_to(installed)]
        untracked = code and git("ls-files", "--others", "--", *code)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ".")
        return git("rev-parse", "HEAD") + ("+dirty" if untracked or changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Installed version of each package that a result can depend on."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], **installed}
