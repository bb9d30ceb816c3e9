"""Checkpoints come back as they were, and a damaged or half-written one costs only itself."""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import paper_scripts

import sac_baseline as sac
from common import checkpoint, replay, run_folder
from common.errors import UserError
from common.replay import Sizes
from common.run import Run, start_run

CAPACITY = 10


def rows(start: int, stop: int) -> dict:
    ids = np.arange(start, stop)
    return {"id": ids.astype(np.int32), "half": np.stack([ids, -ids], 1).astype(np.float16)}


def empty() -> replay.Ring:
    return replay.init_ring(jax.tree.map(lambda x: x[0], rows(0, 1)), CAPACITY)


def ring_of(total: int) -> replay.Ring:
    """A ring into which the rows 0 to `total` have been written one after another."""
    ring = empty()
    for start in range(0, total, 5):
        ring = replay.add_rows(ring, rows(start, min(start + 5, total)))
    return ring


def tree_of(step: int) -> dict:
    return {
        "w": jnp.arange(6.0).reshape(2, 3) + step,
        "count": jnp.asarray(step, jnp.int32),
        "key": jax.random.PRNGKey(step),
    }


def save(run_dir: Path, step: int, total: int | None = None, host=None) -> Path:
    """A checkpoint at `step`; its ring holds `total` (default: `step`) rows."""
    ring = ring_of(step if total is None else total)
    host = {"step": step, **(host or {})}
    return checkpoint.save(run_dir, step, tree_of(step), {"replay": ring}, host)


def load(run_dir: Path, warnings: list | None = None):
    say = print if warnings is None else warnings.append
    return checkpoint.load_newest(run_dir, tree_of(0), {"replay": empty()}, say)


def assert_same(actual, expected) -> None:
    """Equal values, types and dtypes, all the way down."""
    if isinstance(expected, np.ndarray):
        assert isinstance(actual, np.ndarray) and actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
        return
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    else:
        assert actual == expected


def assert_checkpoint(run_dir: Path, step: int, total: int | None = None) -> list[str]:
    """The newest usable checkpoint is that of `step`, whole; returns the warnings."""
    total, warnings = step if total is None else total, []
    env_steps, tree, rings, host = load(run_dir, warnings)
    assert env_steps == step == host["step"]
    jax.tree.map(np.testing.assert_array_equal, tree, tree_of(step))
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, tree_of(step))
    expected = ring_of(total)
    assert int(rings["replay"].total) == total
    jax.tree.map(np.testing.assert_array_equal, rings["replay"].data, expected.data)
    assert rings["replay"].data["half"].dtype == jnp.float16
    return warnings


def ring_files(run_dir: Path) -> list[str]:
    return sorted(f.name for f in (run_dir / "checkpoints" / "rings").iterdir())


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------- round trip


def test_host_values_come_back_as_they_were(tmp_path):
    host = {
        "rng": np.random.default_rng(3).bit_generator.state,  # holds integers of 128 bits
        "huge": 2**200 + 1, "negative": -(2**70), "none": None, "yes": True, "no": False,
        "text": 'ü "quoted"\n', "float": 0.1, "tiny": 5e-324, "inf": float("inf"),
        "tuple": (1, (2.5, None), [np.zeros((0, 3)), ()]), "empty": [{}, [], ()],
        "arrays": [np.arange(3, dtype=np.int64), np.array([True, False]), np.array(7, np.uint8)],
        "frames": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "nan": np.array([np.nan]),
        "numbers as keys": {0: "zero", 1: np.float16([1.5])},
        "words of the format": {"__array__": 1, "__tuple__": [2], "__dict__": {"json": 3}},
    }
    save(tmp_path, 7, host=host)
    restored = load(tmp_path)[3]
    assert_same(restored, {"step": 7, **host})
    generator = np.random.default_rng(0)
    generator.bit_generator.state = restored["rng"]
    np.testing.assert_array_equal(generator.random(4), np.random.default_rng(3).random(4))


def test_tree_and_ring_come_back_as_they_were(tmp_path):
    save(tmp_path, 7)
    assert assert_checkpoint(tmp_path, 7) == []


def test_an_empty_ring_and_several_rings(tmp_path):
    rings = {"positives": empty(), "positives2": ring_of(13), "negatives": ring_of(4)}
    checkpoint.save(tmp_path, 1, (), rings, {})
    restored = checkpoint.load_newest(tmp_path, (), {name: empty() for name in rings})[2]
    for name, ring in rings.items():
        jax.tree.map(np.testing.assert_array_equal, restored[name], ring)


def test_only_plain_values_can_be_saved(tmp_path):
    with pytest.raises(TypeError, match="set"):
        save(tmp_path, 7, host={"bad": {1, 2}})


# -------------------------------------------------------------------------- ring files


def test_ring_files_hold_only_new_rows_and_are_reused(tmp_path):
    save(tmp_path, 4)
    first = tmp_path / "checkpoints/rings/replay-0000000000-0000000004.npz"
    before = (first.stat().st_mtime_ns, first.stat().st_ino)
    save(tmp_path, 9)
    assert ring_files(tmp_path) == [
        "replay-0000000000-0000000004.npz", "replay-0000000004-0000000009.npz"
    ]
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == before
    assert_checkpoint(tmp_path, 9)


def test_no_new_rows_need_no_new_file(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 5, total=4)
    assert ring_files(tmp_path) == ["replay-0000000000-0000000004.npz"]
    assert_checkpoint(tmp_path, 5, total=4)


def test_the_ring_wraps_between_checkpoints(tmp_path):
    """Capacity 10: a file is needed as long as one of its rows has not been overwritten."""
    for step, files in [
        (7, [(0, 7)]),
        (12, [(0, 7), (7, 12)]),
        (14, [(0, 7), (7, 12), (12, 14)]),  # rows 4, 5 and 6 of the first file are still there
        (17, [(0, 7), (7, 12), (12, 14), (14, 17)]),  # the first is kept for step 14
        (18, [(7, 12), (12, 14), (14, 17), (17, 18)]),
        (40, [(7, 12), (12, 14), (14, 17), (17, 18), (30, 40)]),  # overwritten twice over
        (41, [(30, 40), (40, 41)]),
    ]:
        save(tmp_path, step)
        assert assert_checkpoint(tmp_path, step) == []
        assert ring_files(tmp_path) == [f"replay-{a:010d}-{b:010d}.npz" for a, b in files]


def test_two_checkpoints_are_kept(tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, step)
    folders = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert folders == ["rings", "step_0000000006", "step_0000000009"]
    shutil.rmtree(tmp_path / "checkpoints/step_0000000009")
    assert_checkpoint(tmp_path, 6)


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 4, host={"again": True})
    assert load(tmp_path)[3] == {"step": 4, "again": True}


# -------------------------------------------------------------------------- damage


@pytest.mark.parametrize("file", [
    "step_0000000009/state.npz", "step_0000000009/manifest.json",
    "rings/replay-0000000004-0000000009.npz",
])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage):
    save(tmp_path, 4)
    save(tmp_path, 9)
    path = tmp_path / "checkpoints" / file
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut" else 0])
    [warning] = assert_checkpoint(tmp_path, 4)
    assert "step_0000000009 is passed over" in warning


@pytest.mark.parametrize("file", [
    "step_0000000009/state.npz", "rings/replay-0000000004-0000000009.npz",
])
def test_a_flipped_bit_is_noticed(tmp_path, file):
    save(tmp_path, 4)
    save(tmp_path, 9)
    flip_bit(tmp_path / "checkpoints" / file)
    [warning] = assert_checkpoint(tmp_path, 4)
    assert "step_0000000009 is passed over" in warning and "does not match its checksum" in warning


def test_a_disk_that_cannot_be_read_loses_nothing(tmp_path, monkeypatch):
    """An error that may pass is no damage: the newest checkpoint is not given up for it."""
    save(tmp_path, 4)
    save(tmp_path, 9)

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Path, "read_bytes", fail)
        with pytest.raises(OSError, match="Input/output error"):
            load(tmp_path)
    assert assert_checkpoint(tmp_path, 9) == []


def test_nothing_usable_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no usable checkpoint \(0 found\)"):
        load(tmp_path)
    save(tmp_path, 4)
    flip_bit(tmp_path / "checkpoints/step_0000000004/state.npz")
    with pytest.raises(UserError, match=r"no usable checkpoint \(1 found\)"):
        load(tmp_path)


def test_saving_goes_on_after_a_damaged_manifest(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 9)
    (tmp_path / "checkpoints/step_0000000009/manifest.json").write_text("{")
    save(tmp_path, 12)
    assert_checkpoint(tmp_path, 12)


@pytest.mark.parametrize("file", ["step_0000000009/state.npz",
                                  "rings/replay-0000000004-0000000009.npz"])
def test_a_damaged_ring_file_is_not_used_again(tmp_path, file):
    """Resumed from step 4, a run comes to step 9 again: what it saves there must be whole."""
    save(tmp_path, 4)
    save(tmp_path, 9)
    flip_bit(tmp_path / "checkpoints" / file)
    assert_checkpoint(tmp_path, 4)
    save(tmp_path, 9)
    assert assert_checkpoint(tmp_path, 9) == []


def test_a_resumed_runs_other_rows_are_the_ones_saved(tmp_path):
    """The second way from step 4 to step 9 may differ from the first, which is passed over."""
    save(tmp_path, 4)
    save(tmp_path, 9)
    flip_bit(tmp_path / "checkpoints/step_0000000009/state.npz")
    ring = replay.add_rows(load(tmp_path, [])[2]["replay"], rows(104, 109))
    checkpoint.save(tmp_path, 9, tree_of(9), {"replay": ring}, {"step": 9})
    restored = load(tmp_path, [])[2]["replay"]
    np.testing.assert_array_equal(
        restored.data["id"], [0, 1, 2, 3, 104, 105, 106, 107, 108, 0]
    )


@pytest.mark.parametrize("other", [
    {"w": jnp.zeros((2, 4)), "count": jnp.zeros((), jnp.int32), "key": jax.random.PRNGKey(0)},
    {"w": jnp.zeros((2, 3)), "count": jnp.zeros((), jnp.int32)},
])
def test_networks_of_other_shapes_are_refused(tmp_path, other):
    save(tmp_path, 4)
    warnings: list[str] = []
    with pytest.raises(UserError, match=r"cannot be continued by .*networks have other shapes"):
        checkpoint.load_newest(tmp_path, other, {"replay": empty()}, warnings.append)
    assert not warnings, "it is whole"


def test_rows_of_other_shapes_are_refused(tmp_path):
    save(tmp_path, 4)
    wide = replay.init_ring({"id": np.zeros((), np.int32), "half": np.zeros(3, np.float16)}, 10)
    with pytest.raises(UserError, match="the replay's rows have other shapes"):
        checkpoint.load_newest(tmp_path, tree_of(0), {"replay": wide}, print)


def test_other_rings_are_refused(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(UserError, match="the rings are replay, this script's replay, positives"):
        checkpoint.load_newest(tmp_path, tree_of(0), {"replay": empty(), "positives": empty()})


# ----------------------------------------------------------------------------- disk full


class FullDisk:
    """Lets `budget` bytes through, then fails as a full disk does."""

    def __init__(self, file, budget: int):
        self.file, self.budget = file, budget

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if len(data) > self.budget:
            self.file.write(bytes(data)[: self.budget])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("name", ["replay-0000000004", "state.npz", "manifest.json"])
@pytest.mark.parametrize("budget", [0, 50])
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch, name, budget):
    save(tmp_path, 2)
    save(tmp_path, 4)

    def full_open(path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        return FullDisk(file, budget) if "w" in mode and name in str(path) else file

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", full_open, raising=False)
        with pytest.raises(OSError) as caught:
            save(tmp_path, 9)
    assert caught.value.errno == errno.ENOSPC
    assert assert_checkpoint(tmp_path, 4) == []
    left = [f for f in tmp_path.rglob("*") if f.name.endswith(".tmp")]
    assert not left, "a half-written file still takes space"
    save(tmp_path, 9)  # there is space again
    assert assert_checkpoint(tmp_path, 9) == []


def test_a_disk_that_cannot_be_opened_or_flushed(tmp_path, monkeypatch):
    save(tmp_path, 4)

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", no_space, raising=False)
        with pytest.raises(OSError):
            save(tmp_path, 9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError):
            save(tmp_path, 9)
    assert assert_checkpoint(tmp_path, 4) == []


def test_a_run_killed_while_writing(tmp_path):
    """What a kill leaves: ring files nobody names, a folder under its temporary name."""
    save(tmp_path, 4)
    root = tmp_path / "checkpoints"
    (root / "rings/replay-0000000004-0000000009.npz").write_bytes(b"other rows")
    (root / "rings/replay-0000000004-0000000010.npz.tmp").write_bytes(b"half of them")
    (root / ".writing_0000000009").mkdir()
    (root / ".writing_0000000009/state.npz").write_bytes(b"stale")
    assert assert_checkpoint(tmp_path, 4) == []
    save(tmp_path, 9)
    assert assert_checkpoint(tmp_path, 9) == []
    assert not [f for f in root.rglob("*") if f.suffix == ".tmp" or f.name.startswith(".writing")]


# ------------------------------------------------------------------------------ memory


def megabytes_resident(which: str) -> float:
    """VmRSS, this process's memory now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{which}:\s*(\d+) kB$", status, re.M)[1]) / 1024


@contextlib.contextmanager
def peak_megabytes():
    """A list that gets the peak of this process's memory above what it has now."""
    gc.collect()
    libc = ctypes.CDLL(None)
    # Arrays of 1 MiB or more go back to the system as soon as they are freed (M_MMAP_THRESHOLD is
    # -3; by itself it grows to 32 MiB, and then freed arrays are counted or not by chance).
    libc.mallopt(-3, 2**20)
    libc.malloc_trim(0)  # memory that is free already is given back, not used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, found = megabytes_resident("VmRSS"), []
    yield found
    found.append(megabytes_resident("VmHWM") - before)


def fill_and_save(script, args) -> None:
    """A run whose replay is full when it is saved; its first row is of ones, the rest of zeros."""
    buffers = script.init_buffers(Sizes(39, 4, 64), args)
    run = start_run(args, buffers, Sizes(39, 4, 64), NoEnvs(), NO_EVALUATION)
    state, buffers, _ = run.begin({"w": jnp.zeros(2)}, buffers, NoEnvs())
    ones = jax.tree.map(lambda x: np.ones((1, *x.shape[1:]), x.dtype), buffers[0].data)
    data = replay.add_rows(buffers[0], ones).data
    full = replay.Ring(data, jnp.asarray(args.buffer_size, jnp.int32))
    run.env_steps = 4
    run.save(state, type(buffers)(full, *buffers[1:]), NoEnvs())
    run.close(finished=False)


def resume_and_check(script, args) -> None:
    args = replace(args, resume=args.run_dir)
    buffers = script.init_buffers(Sizes(39, 4, 64), args)
    run = start_run(args, buffers, Sizes(39, 4, 64), NoEnvs(), NO_EVALUATION)
    _, buffers, _ = run.begin({"w": jnp.zeros(2)}, buffers, NoEnvs())
    run.close(finished=False)
    assert int(buffers[0].total) == args.buffer_size
    for x in jax.tree.leaves(buffers[0].data):
        assert (np.asarray(x[0]) == 1).all() and not np.asarray(x[-1]).any()


@pytest.mark.skipif(not Path("/proc").exists(), reason="nothing else tells a peak of memory anew")
@pytest.mark.parametrize("name", [*paper_scripts(), "vlm_rm_dqn"])
def test_resuming_takes_no_more_memory_than_training(tmp_path, name):
    """A full replay of 64 MiB, saved by one checkpoint and loaded, for the buffers of each script.

    Counted is what is taken from the making of the buffers on; the rest is the same in both.
    """
    script = importlib.import_module(name)
    args = script.Args(run_dir=str(tmp_path / "small"), num_envs=2, total_timesteps=8,
                       buffer_size=8)
    fill_and_save(script, args)  # what is imported and compiled once is not counted
    resume_and_check(script, args)
    row_bytes = replay.row_bytes(script.init_buffers(Sizes(39, 4, 64), args)[0])
    args = replace(args, run_dir=str(tmp_path / "large"), buffer_size=64 * 2**20 // row_bytes)
    with peak_megabytes() as training:
        fill_and_save(script, args)
    with peak_megabytes() as resuming:
        resume_and_check(script, args)
    assert 60 < resuming[0] < 1.1 * training[0]


def test_a_refused_resume_leaves_the_total_as_it_was(tmp_path):
    script = importlib.import_module("sac_baseline")
    args = script.Args(run_dir=str(tmp_path / "run"), num_envs=2, total_timesteps=8, buffer_size=8)
    fill_and_save(script, args)
    args = replace(args, resume=args.run_dir, total_timesteps=16)
    buffers = script.init_buffers(Sizes(39, 4, 64), args)
    run = start_run(args, buffers, Sizes(39, 4, 64), NoEnvs(), NO_EVALUATION)
    with pytest.raises(UserError, match="cannot be continued by this script"):
        run.begin({"w": jnp.zeros(3)}, buffers, NoEnvs())  # the script's networks have changed
    run.close(finished=False)
    assert '"total_timesteps": 8' in (tmp_path / "run" / "config.json").read_text()


def test_a_checkpoint_that_fails_late_leaves_nothing_in_the_rings(tmp_path):
    """Its first file is whole and has been written to the ring when the second is found damaged."""
    save(tmp_path, 4)
    save(tmp_path, 9)
    [last] = [name for name in ring_files(tmp_path) if "0000000009" in name]
    path = next((tmp_path / "checkpoints/rings").glob(last))
    path.write_bytes(path.read_bytes()[:-1])
    [warning] = assert_checkpoint(tmp_path, 4)
    assert "does not match its checksum" in warning


def test_rings_are_saved_in_small_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 3 * 8)  # a row of these tests takes 8
    save(tmp_path, 4)
    save(tmp_path, 9)
    assert [name[len("replay-"):-len(".npz")] for name in ring_files(tmp_path)] == [
        "0000000000-0000000003", "0000000003-0000000004", "0000000004-0000000007",
        "0000000007-0000000009"]
    assert assert_checkpoint(tmp_path, 9) == []
    save(tmp_path, 21)  # the ring has gone round
    assert assert_checkpoint(tmp_path, 21) == []


# ------------------------------------------------------------------------------- space


def test_check_space_counts_what_the_run_can_fill(tmp_path, monkeypatch):
    row_bytes = 4 + 2 * 2
    base = 400 * 2**20

    def with_free(free):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    rings = {"replay": empty()}
    with_free(base + CAPACITY * row_bytes)
    checkpoint.check_space(tmp_path, rings, 1000)
    with_free(base + CAPACITY * row_bytes - 1)
    with pytest.raises(UserError, match="--run-dir"):
        checkpoint.check_space(tmp_path, rings, 1000)
    with_free(base + 4 * row_bytes)  # a run of four steps never fills the ring
    checkpoint.check_space(tmp_path, rings, 4)
    with pytest.raises(UserError, match="--buffer-size"):
        checkpoint.check_space(tmp_path, rings, 5)


def test_the_manifest_names_every_file(tmp_path):
    folder = save(tmp_path, 9)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["env_steps"] == 9 and manifest["totals"] == {"replay": 9}
    assert list(manifest["files"]) == ["rings/replay-0000000000-0000000009.npz"]


@pytest.mark.parametrize("content", ["[]", '{"env_steps": 9}', None])
def test_a_changed_manifest_is_passed_over(tmp_path, content):
    """None: whole but for one digit in the totals, which its checksum finds."""
    save(tmp_path, 4)
    save(tmp_path, 9)
    path = tmp_path / "checkpoints/step_0000000009/manifest.json"
    if content is None:
        content = path.read_text().replace('"replay": 9', '"replay": 8')
        assert content != path.read_text()
    path.write_text(content)
    warnings = assert_checkpoint(tmp_path, 4)
    assert "its manifest is damaged" in warnings[0]


def test_a_checkpoint_of_another_format_is_passed_over(tmp_path, monkeypatch):
    save(tmp_path, 4)
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    save(tmp_path, 9)
    monkeypatch.undo()
    warnings = assert_checkpoint(tmp_path, 4)
    assert "another version's" in warnings[0]


@pytest.mark.parametrize("number", [1, 3])
def test_a_checkpoint_of_an_earlier_format_is_refused(tmp_path, monkeypatch, number):
    assert checkpoint.FORMAT == 5
    monkeypatch.setattr(checkpoint, "FORMAT", number)
    save(tmp_path, 4)
    monkeypatch.undo()
    warnings: list[str] = []
    with pytest.raises(UserError, match="no usable checkpoint"):
        load(tmp_path, warnings)
    assert "another version's" in warnings[0]


# ----------------------------------------------------------------- a replay that is gone


def test_a_dropped_replay_leaves_the_networks(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 9)
    checkpoint.drop_replay(tmp_path)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_0000000009"]
    env_steps, leaves, host = checkpoint.read_newest(tmp_path)
    assert env_steps == 9 and host == {"step": 9}
    tree = checkpoint.unflatten(leaves, tree_of(0))
    jax.tree.map(np.testing.assert_array_equal, tree, tree_of(9))
    with pytest.raises(UserError, match=r"cannot be continued.*\(--drop-replay\).*be evaluated"):
        load(tmp_path)
    assert checkpoint.read_newest(tmp_path)[0] == 9, "the refusal removes nothing"


def test_dropping_nothing_is_no_error(tmp_path):
    checkpoint.drop_replay(tmp_path)
    with pytest.raises(UserError, match=r"no usable checkpoint \(0 found\)"):
        load(tmp_path)


class NoEnvs:
    """What a run asks of its environments."""

    resumes_episodes, draws, engine = True, False, "none"

    def observations(self) -> np.ndarray:
        return np.zeros((2, 39), np.float32)

    def get_state(self) -> dict:
        return {"what": "environments"}

    def set_state(self, state: dict) -> np.ndarray:
        assert state == self.get_state()
        return self.observations()

    def close(self) -> None:
        pass


NO_EVALUATION = SimpleNamespace(settings={}, close=lambda: None)


def begin_run(args: sac.Args) -> tuple[Run, tuple]:
    """A run with tiny networks and no environments: (run, what its `begin` returns)."""
    sizes = Sizes(39, 4)
    buffers = sac.init_buffers(sizes, args)
    run = start_run(args, buffers, sizes, NoEnvs(), NO_EVALUATION)
    try:
        return run, run.begin(sac.init_state(jax.random.key(0), sizes, args), buffers, NoEnvs())
    except UserError:
        run.close(finished=False)
        raise


@pytest.mark.parametrize("drop", [True, False])
def test_a_finished_run_drops_its_replay_only_when_asked(tmp_path, drop):
    folder = tmp_path / "run"
    args = sac.Args(run_dir=str(folder), num_envs=2, total_timesteps=4, buffer_size=8,
                    hidden_features=(4,), drop_replay=drop)
    run, (state, buffers, obs) = begin_run(args)
    assert run.env_steps == 0 and obs.shape == (2, 39)
    rows = jax.tree.map(lambda x: np.ones((2, *x.shape[1:]), x.dtype), buffers.transitions.data)
    run.env_steps = 2
    run.save(state, sac.Buffers(replay.add_rows(buffers.transitions, rows)), NoEnvs())
    run.close(finished=False)  # as when it is interrupted

    resumed = replace(args, resume=str(folder))
    run, (state, buffers, _) = begin_run(resumed)
    assert run.env_steps == 2 and int(buffers.transitions.total) == 2
    np.testing.assert_array_equal(buffers.transitions.data.obs[:2], rows.obs)
    run.env_steps = 4
    run.save(state, sac.Buffers(replay.add_rows(buffers.transitions, rows)), NoEnvs())
    run.close()

    assert (folder / "checkpoints" / "rings").exists() != drop
    if drop:
        with pytest.raises(UserError, match="its replay was deleted when it finished"):
            begin_run(resumed)
    else:
        run, (_, buffers, _) = begin_run(resumed)
        assert run.env_steps == 4 and int(buffers.transitions.total) == 4
        run.close()
    leaves = checkpoint.read_newest(folder)[1]
    for ours, theirs in zip(checkpoint.unflatten(leaves, state).params["actor"]["params"].values(),
                            state.params["actor"]["params"].values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_flag_and_the_refusal_on_the_command_line(tmp_path, refused):
    """A whole run with --drop-replay; --resume then ends with one line and status 2."""
    folder = tmp_path / "run"
    args = sac.Args(run_dir=str(folder), env_id="drawer-close-v3", num_envs=2, total_timesteps=4,
                    buffer_size=8, hidden_features=(4,), drop_replay=True)
    sac.main(args)
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step_0000000004"]
    flags = ["--resume", str(folder), "--total-timesteps", "8"]
    refused(sac, flags, "cannot be continued: its replay was deleted when it finished")
