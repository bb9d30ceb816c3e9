"""The number of cores, and what follows from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import cores
from common.envs.metaworld_suite import VecMetaWorld
from common.errors import UserError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    for name in (cores.OVERRIDE, "NPROC", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    yield
    for name in ("NPROC", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)  # monkeypatch then puts back what was there


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("250000 100000", 3), ("50000 100000", 1),
     ("1600000 100000", 8), ("", 8)],
)
def test_a_containers_quota_counts(quota, expected):
    cores.CGROUP_QUOTA.write_text(quota)
    assert cores.num_cores() == expected


def test_affinity_counts_without_a_quota():
    assert cores.num_cores() == 8


def test_the_override_wins_and_is_checked(monkeypatch):
    monkeypatch.setenv(cores.OVERRIDE, "3")
    cores.share_cores()
    assert cores.num_cores() == 3
    assert os.environ["NPROC"] == os.environ["OMP_NUM_THREADS"] == "3"
    for bad in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv(cores.OVERRIDE, bad)
        with pytest.raises(UserError, match="FURL_NUM_CORES must be a whole number"):
            cores.num_cores()


def test_threads_that_the_user_chose_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    cores.share_cores()
    assert os.environ["NPROC"] == "8" and os.environ["OMP_NUM_THREADS"] == "5"


def test_workers_follow_it(monkeypatch):
    monkeypatch.setenv(cores.OVERRIDE, "1")
    envs = VecMetaWorld("reach-v3", 2, seed=0)
    assert len(envs._workers) == 1
    envs.close()


@pytest.mark.skipif(not Path("/proc").exists(), reason="nothing else tells the names of threads")
def test_libraries_follow_it():
    code = (
        "from common.cores import share_cores; share_cores(); import jax.numpy as jnp, torch, os;"
        "(jnp.ones((512, 512)) @ jnp.ones((512, 512))).block_until_ready();"
        "names = [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')];"
        "print(torch.get_num_threads(), sum('XLAEigen' in name for name in names))"
    )
    environment = {**os.environ, cores.OVERRIDE: "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=environment, timeout=120)
    assert result.stdout.split() == ["1", "1"], result.stderr
