"""Locks: what each requirements*.txt needs, to the last package, with versions and hashes.

    python tools/setup/lock.py renew              # all locks, by uv; `make lock`
    python tools/setup/lock.py renew --upgrade    # ... with the newest versions that fit
    python tools/setup/lock.py check requirements.lock

requirements.txt is what people read and edit: the packages that the code imports. Its lock,
requirements.lock, has in addition what those need, for Python 3.11 to 3.13 on Linux and macOS; uv
makes it, nobody edits it. Its second line is a digest of both files. So a lock that was made from
other pins, was edited, or was merged line by line is recognised without a network, and `check`
refuses it. Any Python 3, no packages needed; `renew` needs uv in the same environment.
"""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
MACOS = "14.0"  # the oldest for which there is a wheel of torch
DIGEST = "# digest: "


def pins(requirements: Path) -> list[str]:
    """The requirements of a file and of those that it names by -r, without comments, sorted."""
    found = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r "):
            found += pins(requirements.parent / line[3:].strip())
        elif line:
            found.append(line)
    return sorted(set(found))


def lock_of(requirements: Path) -> Path:
    return requirements.with_suffix(".lock")


def requirements_of(lock: Path) -> Path:
    return lock.with_suffix(".txt")


def digest(requirements: Path, body: str) -> str:
    """One number of what is wanted and what is locked."""
    return hashlib.sha256("\n".join([*pins(requirements), body]).encode()).hexdigest()


def write(lock: Path, body: str) -> None:
    """Write a lock whose packages are `body`."""
    requirements = requirements_of(lock)
    lock.write_text(
        f"# Made from {requirements.name} by `make lock`; do not edit.\n"
        f"{DIGEST}{digest(requirements, body)}\n{body}", encoding="utf-8"
    )


def problem(lock: Path) -> str:
    """Why a lock must not be installed, in one line; empty if it belongs to its requirements."""
    requirements = requirements_of(lock)
    if not lock.exists():
        return f"there is no {lock.name}: run `make lock`"
    lines = lock.read_text(encoding="utf-8").splitlines(keepends=True)
    body = "".join(line for line in lines if not line.startswith("#"))
    if f"{DIGEST}{digest(requirements, body)}\n" not in lines:
        return (f"{lock.name} does not belong to {requirements.name} (one of them has changed "
                "since the lock was made): run `make lock`")
    return ""


# ------------------------------------------------------------------------------ by uv


def uv(*args: str | Path) -> str:
    """What `uv pip ARGS` prints; ends this program if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", *map(str, args)], capture_output=True, text=True,
        env={"MACOSX_DEPLOYMENT_TARGET": MACOS, **os.environ},
    )
    if done.returncode:
        sys.exit(f"{done.stderr.strip()}\nerror: uv pip {' '.join(map(str, args))} failed (above)")
    return done.stdout


def renew(root: Path, flags: list[str]) -> None:
    """Make all locks again. The others take over the versions of requirements.lock."""
    base = lock_of(root / "requirements.txt")
    files = sorted(root.glob("requirements*.txt"), key=lambda path: (lock_of(path) != base, path))
    for requirements in files:
        lock = lock_of(requirements)
        constraints = [] if lock == base else ["-c", base]
        # One version for all Pythons where there is one, because one Python is what the tests see.
        # An index, which may be somebody's own, and comments with paths stay out of the lock.
        uv("compile", requirements, "-o", lock, "-q", "--universal", "--fork-strategy", "fewest",
           "--python-version", PYTHONS[0], "--only-binary", ":all:", "--generate-hashes",
           "--no-emit-index-url", "--no-header", "--no-annotate", *constraints, *flags)
        write(lock, lock.read_text(encoding="utf-8"))
        count = sum(line[0].isalnum() for line in lock.read_text(encoding="utf-8").splitlines())
        print(f"{lock.name}: {count} packages", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for requirements in files:
            linux_only = any("cuda" in pin for pin in pins(requirements))
            for python, platform in itertools.product(PYTHONS, PLATFORMS):
                if not (linux_only and "darwin" in platform):
                    uv("install", "--dry-run", "--require-hashes", "--only-binary", ":all:",
                       "--python-version", python, "--python-platform", platform,
                       "--target", folder, "-r", lock_of(requirements))
    print(f"There are wheels for Python {', '.join(PYTHONS)} on {', '.join(PLATFORMS)}")


def main(command: str = "", *args: str) -> None:
    if command == "renew":
        renew(Path(__file__).resolve().parents[2], list(args))
    elif command == "check" and args:
        for lock in args:
            if reason := problem(Path(lock)):
                sys.exit(f"error: {reason}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
