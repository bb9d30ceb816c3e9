"""Compiled programs are kept between runs, apart for each jaxlib and CPU, and damage is silent."""

import os
import subprocess
import sys
from pathlib import Path

from common import cache

ROOT = Path(cache.__file__).resolve().parent.parent
CPUINFO = (
    "processor\t: 0\ncpu family\t: 6\nmodel\t: 85\nmodel name\t: A CPU\nstepping\t: 7\n"
    "cpu MHz\t: 2500\nflags\t: fpu avx2\n\nprocessor\t: 1\nmodel\t: 85\n"
)
PROGRAM = """
import jax, jax.numpy as jnp
from common.cache import keep_compiled_programs
keep_compiled_programs()
print(jax.jit(lambda x: x @ x)(jnp.arange(5.0)))
"""


def folder_for(monkeypatch, cpuinfo: str | None, jaxlib: str = "0.7.0") -> Path:
    """The folder that a machine with this /proc/cpuinfo (None: it has none) would use."""
    def read_text(path, *args, **kwargs):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    with monkeypatch.context() as patch:
        patch.setattr(cache.Path, "read_text", read_text)
        patch.setattr(cache.metadata, "version", {"jaxlib": jaxlib}.__getitem__)
        return cache.compilation_cache_dir()


def test_the_folder_depends_on_jaxlib_and_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("FURL_CACHE_DIR", str(tmp_path))
    mine = folder_for(monkeypatch, CPUINFO)
    assert mine.is_relative_to(tmp_path) and "0.7.0" in mine.name
    others = [folder_for(monkeypatch, CPUINFO, jaxlib="0.7.1"), folder_for(monkeypatch, None)]
    for new in ("avx512f avx2", "fpu"):
        others.append(folder_for(monkeypatch, CPUINFO.replace("fpu avx2", new)))
    for line in ("model name\t: A CPU", "model\t: 85", "cpu family\t: 6", "stepping\t: 7"):
        others.append(folder_for(monkeypatch, CPUINFO.replace(line, line + "1")))
    assert len({mine, *others}) == 1 + len(others), others
    # What changes from minute to minute, or with the number of cores, is no other CPU.
    for same in (CPUINFO.replace("2500", "800"), CPUINFO.split("\n\n")[0] + "\n"):
        assert folder_for(monkeypatch, same) == mine


def test_caches_have_a_place_without_a_home_folder(monkeypatch):
    def no_home():
        raise RuntimeError

    for name in ("FURL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache.cache_dir() == Path.home() / ".cache/furl"
    monkeypatch.setattr(cache.Path, "home", no_home)
    assert cache.cache_dir().name == f"furl-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_dir() == Path("/x/furl")
    monkeypatch.setenv("FURL_CACHE_DIR", "/y")
    assert cache.cache_dir() == Path("/y")


def run(caches: Path, **environment: str) -> None:
    """Compile and run a program as scripts do; nothing but its result may be printed."""
    chosen_here = ("JAX_COMPILATION", "JAX_PERSISTENT")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(chosen_here)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=inherited | {"FURL_CACHE_DIR": str(caches)} | environment,
    )
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("30.0\n", "")


def programs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("jit_*-cache"))


def test_programs_are_kept_and_garbage_is_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("FURL_CACHE_DIR", str(tmp_path))
    run(tmp_path)
    kept = programs(cache.compilation_cache_dir())
    assert kept and programs(tmp_path) == kept
    times = [path.stat().st_mtime_ns for path in kept]
    run(tmp_path)
    assert programs(tmp_path) == kept and [path.stat().st_mtime_ns for path in kept] == times
    for damage in (lambda data: b"garbage", lambda data: data[: len(data) // 2], lambda data: b""):
        for path in kept:
            path.write_bytes(damage(path.read_bytes()))
        run(tmp_path)


def test_a_cache_that_cannot_be_written_is_silent(tmp_path):
    (tmp_path / "file").write_text("mine")
    run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_jaxs_own_variable_says_where(tmp_path):
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "chosen"),
              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
              "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    run(tmp_path / "ours", **chosen)
    assert programs(tmp_path / "chosen") and not (tmp_path / "ours").exists()
