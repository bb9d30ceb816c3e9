"""The locks belong to requirements*.txt, and `make setup` refuses one that does not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.setup import lock

ROOT = Path(__file__).parents[1]
REQUIREMENTS = sorted(ROOT.glob("requirements*.txt"))


def packages(text: str) -> dict[str, list[str]]:
    """Name -> the versions that a lock has of it, one for each range of Pythons."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^ ]+)", text, re.M):
        found.setdefault(name, []).append(version)
    return found


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with requirements.txt, one file that includes it, and the locks of both."""
    (tmp_path / "requirements.txt").write_text("six==1.17.0  # why\n")
    (tmp_path / "requirements-more.txt").write_text("-r requirements.txt\nidna==3.20\n")
    for name, body in (("requirements", "six==1.17.0 \\\n    --hash=sha256:00\n"),
                       ("requirements-more", "idna==3.20\nsix==1.17.0\n")):
        lock.write(tmp_path / f"{name}.lock", body)
    return tmp_path


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.stem)
def test_each_requirements_file_has_its_lock(path: Path):
    """Made from it as it is, with the pinned versions, and nothing of the machine that made it."""
    assert lock.problem(lock.lock_of(path)) == ""
    text = lock.lock_of(path).read_text()
    locked = packages(text)
    for pin in lock.pins(path):
        name, version = re.fullmatch(r"([\w.-]+)(?:\[\S+\])?==(\S+)", pin).groups()
        assert locked[name.lower().replace("_", "-")] == [version]
    entries = re.split(r"^(?=\w)", text, flags=re.M)[1:]
    assert len(entries) > len(lock.pins(path))
    for entry in entries:
        assert re.fullmatch(r"\S+==[^\\]+(\\\n +--hash=sha256:[0-9a-f]{64} ?)+\n", entry), entry
    assert not re.search(r"://|index-url|find-links|(^|\s)/", text)


def test_all_locks_agree():
    """Ray's or CUDA's lock can be installed over that of requirements.txt without changing it."""
    base = packages((ROOT / "requirements.lock").read_text())
    for path in REQUIREMENTS:
        locked = packages(lock.lock_of(path).read_text())
        assert {name: locked[name] for name in base.keys() & locked} == {
            name: base[name] for name in base.keys() & locked}


@pytest.mark.parametrize(("name", "old", "new", "refused"), [
    ("requirements.txt", "1.17.0", "1.16.0", True),
    ("requirements.txt", "1.17.0", "1.17.0\nidna==3.20", True),
    ("requirements.txt", "# why", "# why not", False),
    ("requirements.lock", "sha256:00", "sha256:01", True),
    ("requirements.lock", "six==1.17.0", "six==1.16.0", True),
])
def test_a_lock_that_does_not_belong_is_refused(files: Path, name, old, new, refused):
    path = files / name
    path.write_text(path.read_text().replace(old, new))
    reason = lock.problem(files / "requirements.lock")
    assert ("make lock" in reason and "\n" not in reason) if refused else reason == ""


def test_a_change_of_an_included_file_counts(files: Path):
    assert lock.problem(files / "requirements-more.lock") == ""
    (files / "requirements.txt").write_text("six==1.16.0\n")
    assert "more.lock does not belong" in lock.problem(files / "requirements-more.lock")
    (files / "requirements-more.lock").unlink()
    assert "there is no requirements-more.lock" in lock.problem(files / "requirements-more.lock")


def install(folder: Path, *, uv_fails: bool) -> subprocess.CompletedProcess:
    """tools/setup/install.sh with a Python that only says what it was asked to do."""
    setup = folder / "tools/setup"
    setup.mkdir(parents=True)
    for name in ("install.sh", "lock.py"):
        shutil.copy(ROOT / "tools/setup" / name, setup)
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in\n*lock.py*) exec {sys.executable} "$@";;\n'
        f'*"-m uv"*) echo "no route"; exit {int(uv_fails)};;\nesac\necho "$@" >> asked\n')
    python.chmod(0o755)
    return subprocess.run([setup / "install.sh", python, "requirements.lock"], cwd=folder,
                          capture_output=True, text=True, timeout=60)


def test_where_uv_cannot_pip_installs_the_same_lock(files: Path):
    done = install(files, uv_fails=True)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "uv could not install requirements.lock (no route): pip does it, which takes longer"]
    assert (files / "asked").read_text().splitlines()[-1].endswith(
        "--require-hashes -r requirements.lock")


def test_uv_installs_alone_and_only_a_lock_that_belongs(files: Path):
    done = install(files, uv_fails=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "-r requirements.lock" not in (files / "asked").read_text()
    (files / "requirements.txt").write_text("six==1.16.0\n")
    shutil.rmtree(files / "tools")
    (files / "asked").unlink()
    done = install(files, uv_fails=False)
    assert done.returncode == 1 and "run `make lock`" in done.stderr
    assert not (files / "asked").exists()
