"""Other systems: macOS by a stand-in for it, what set-up says where nothing can be set up, and
which of JAX's builds it chooses."""

import csv
import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import system
from tools.setup import detect_gpu, lock

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    "--env-id", "drawer-close-v3", "--num-envs", "2", "--total-timesteps", "200",
    "--learning-starts", "40", "--batch-size", "8", "--utd", "0.5", "--hidden-features", "16",
    "16", "--buffer-size", "1000", "--embedding-buffer-size", "500", "--eval-every", "200",
    "--log-every", "20",
]


@pytest.fixture
def mac(tmp_path) -> dict[str, str]:
    """The environment of a process that takes this machine for a Mac."""
    if system.ON_MAC:
        pytest.skip("this is one")
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(ROOT / "tests/mac.py", site / "sitecustomize.py")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def run(words: list[str], environment: dict[str, str]) -> str:
    result = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment,
                            capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_on_a_mac_gives_the_same_numbers(tmp_path, mac):
    """Two workers that share memory and draw; every metric but times, to the last digit."""
    found = []
    for name, environment in (("here", dict(os.environ)), ("mac", mac)):
        folder = tmp_path / name
        run(["furl_sac_state.py", *RUN, "--run-dir", str(folder)],
            environment | {"FURL_NUM_CORES": "2"})
        with open(folder / "metrics.csv", newline="") as file:
            found.append([row for row in csv.reader(file) if not row[1].startswith("time/")])
    assert found[0] == found[1] and len(found[0]) > 50


def test_a_mac_is_asked_for_what_it_has(mac):
    code = (
        "import os, mujoco; from common import cache, cores, memory, system;"
        "from common.envs.rendering import gl_info; gl_info();"
        "print(os.environ['MUJOCO_GL'], cores.num_cores(), memory.device_memory());"
        "fd = system.memory_file(); print(os.fstat(fd).st_nlink, os.write(fd, b'12'))"
    )
    environment = {name: x for name, x in mac.items() if name != "FURL_NUM_CORES"}
    assert run(["-c", code], environment | {"JAX_PLATFORMS": "cpu"}).splitlines() == [
        f"cgl {os.cpu_count()} None", "0 2"]


def test_gymnasiums_own_pictures_on_a_mac(mac):
    code = (
        "from common.envs import gymnasium_suite as suite;"
        "from common.envs.rendering import Camera;"
        "env = suite.make_env('Reacher-v5', seed=0, index=0, frame_size=64);"
        "picture = suite.make_draw(env, Camera(64))(env);"
        "print(picture.std() > 10, picture.tobytes().hex())"
    )
    picture = run(["-c", code], mac)
    assert picture.startswith("True") and picture == run(["-c", code], dict(os.environ))


@pytest.mark.parametrize(("users", "all_of_it"), [
    (None, "/ours"), ("", "/ours"), ("/mine:/too", "/ours:/mine:/too"),
])
def test_what_processes_find_besides_the_users_own(monkeypatch, users, all_of_it):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if users is not None:
        monkeypatch.setenv("PYTHONPATH", users)
    assert system.python_path(Path("/ours")) == all_of_it


def test_the_processor_of_a_mac(monkeypatch, tmp_path):
    sysctl = tmp_path / "sysctl"
    sysctl.write_text("#!/bin/sh\necho $1.brand_string: Apple M1\n")
    sysctl.chmod(0o755)

    def no_proc(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(system.Path, "read_text", no_proc)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system.cpu_description() == "machdep.cpu.brand_string: Apple M1\n"
    sysctl.unlink()
    assert system.cpu_description() == ""


@pytest.mark.parametrize(("is_mac", "layout", "size"),
                         [(False, "hhqqi4x", 32), (True, "qqihh", 24)])
def test_the_question_for_a_lock(monkeypatch, tmp_path, is_mac, layout, size):
    """sizeof(struct flock), and the answers, of a system that is asked in its own layout."""
    place = 3 if is_mac else 0
    monkeypatch.setattr(system, "FLOCK", layout)
    monkeypatch.setattr(system, "LOCK_TYPE", place)
    answers = []

    def fcntl(file, command, question):
        fields = list(struct.unpack(layout, question))
        assert len(question) == size and command == system.fcntl.F_GETLK
        assert fields.pop(place) == system.fcntl.F_WRLCK and fields == [0] * 4
        fields.insert(place, answers[-1])
        return struct.pack(layout, *fields)

    monkeypatch.setattr(system.fcntl, "fcntl", fcntl)
    for answer, locked in ((system.fcntl.F_WRLCK, True), (system.fcntl.F_UNLCK, False)):
        answers.append(answer)
        assert system.is_locked(None) is locked


# ------------------------------------------------------------------------------- set-up


def setup_on(folder: Path, name: str, machine: str, bits: str, release: str):
    """`make setup` of a copy of the set-up, on a system that describes itself like this."""
    for path in ("Makefile", "tools/setup", *(p.name for p in ROOT.glob("requirements*"))):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        (folder / path).parent.mkdir(exist_ok=True)
        copy(ROOT / path, folder / path)
    commands = folder / "commands"
    commands.mkdir()
    for command, text in {
        "uname": f'case $1 in -s) echo {name};; -m) echo {machine};; -r) echo {release};; esac',
        "getconf": f"echo {bits}",
        # A system that is supported gets this far; nothing is installed by this test.
        "the_python": 'case "$*" in *version_info*) exit 1;; esac',
    }.items():
        (commands / command).write_text(f"#!/bin/sh\n{text}\n")
        (commands / command).chmod(0o755)
    return subprocess.run(
        ["make", "--no-print-directory", "setup", "GPU=0", "PYTHON=the_python"], cwd=folder,
        capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "MAKEFLAGS": ""},
    )


@pytest.mark.parametrize(("system_name", "machine", "bits", "release", "refused"), [
    ("Linux", "x86_64", "64", "6.1.0", ""),
    ("Linux", "aarch64", "64", "6.1.0", ""),
    ("Linux", "x86_64", "64", "5.15.90.1-microsoft-standard-WSL2", ""),
    ("Darwin", "arm64", "64", "23.6.0", ""),
    ("Darwin", "x86_64", "64", "23.6.0", "macOS on an Intel processor"),
    ("Linux", "x86_64", "64", "4.4.0-19041-Microsoft", "WSL 1"),
    ("MINGW64_NT-10.0-22631", "x86_64", "64", "3.4.10", "Windows without WSL 2"),
    ("Linux", "aarch64", "32", "6.1.0", "Linux with 32 bit"),
    ("Linux", "armv7l", "32", "6.1.0", "Linux with 32 bit"),
    ("Linux", "riscv64", "64", "6.1.0", "Linux on riscv64"),
])
def test_set_up_refuses_other_systems_in_one_line(
        tmp_path, system_name, machine, bits, release, refused):
    done = setup_on(tmp_path, system_name, machine, bits, release)
    [line, last] = done.stderr.splitlines()
    assert done.returncode == 2 and "***" in last  # make's own
    assert line.startswith(f"error: {refused}" if refused else "error: no Python 3.11")
    assert not (tmp_path / ".venv").exists() and done.stdout == ""


def test_the_workflow_runs_what_there_is():
    """Every Python that the locks are for, and tests that exist; GitHub alone can run it."""
    text = (ROOT / ".github/workflows/systems.yml").read_text()
    [pythons] = re.findall(r"^ +python: \[(.+)\]$", text, re.M)
    assert pythons == ", ".join(f'"{version}"' for version in lock.PYTHONS)
    files = re.findall(r"tests/\w+\.py", text)
    assert files and all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize(("init", "gpus", "version", "reason"), [
    (0, 1, 13000, ""),
    (0, 1, 13010, ""),
    (0, 1, 12080, "too old for CUDA 13"),
    (0, 0, 13000, "finds no usable GPU"),
    (999, 1, 13000, "CUDA error 999"),
    (None, 1, 13000, "cannot be loaded"),
])
def test_the_driver_decides_about_the_cuda_build(monkeypatch, init, gpus, version, reason):
    def write(value):
        return lambda number: setattr(number._obj, "value", value) or 0

    def load(name):
        if init is None:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=write(gpus),
                               cuDriverGetVersion=write(version))

    monkeypatch.setattr(ctypes, "CDLL", load)
    found = detect_gpu.problem()
    assert reason in found and bool(found) == bool(reason)
