"""Checkpoints that hold everything a run needs to continue as if it had not stopped.

    checkpoints/
      rings/<name>-<start>-<stop>.npz     rows of a ring buffer, written once, never changed
      step_0000010000/state.npz           networks, optimizers, environments, counts
      step_0000010000/manifest.json       the sha256 of state.npz and of each ring file it needs

A replay only grows, so each checkpoint writes the rows that are new since the one before, in files
of `FILE_BYTES` at most: neither saving nor loading holds more of a ring in memory than the ring
itself and one such file. A step folder is written under a temporary name and renamed: it is whole,
or it is not there. No pickle: arrays in .npz, the rest in JSON.
"""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import ShortageError, UserError
from common.replay import Ring, add_rows, read_rows, row_bytes
from common.run_folder import CHECKPOINTS, checkpoint_folder, checkpoints, write_file

KEEP = 2  # checkpoints kept: the newest, and the one before in case the newest is damaged
FORMAT = 5  # raised when what the scripts save changes: they would misread an older one
FILE_BYTES = 16 * 2**20  # of a ring's rows in one file, at most


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or does not fit the run."""


class MisfitError(CheckpointError):
    """A checkpoint that is whole, of a script with other networks or rings."""


def save(run_dir: Path, env_steps: int, tree: Any, rings: dict[str, Ring], host: Any) -> Path:
    """Write a checkpoint; earlier ones stay until it is complete.

    Args:
        run_dir: the run folder.
        env_steps: environment steps done.
        tree: pytree of arrays.
        rings: ring buffers by name.
        host: nested dicts and lists of numpy arrays, numbers, strings, bools and None.

    Raises:
        OSError: the disk is full or read-only; what was saved before is untouched.
    """
    root = run_dir / CHECKPOINTS
    (root / "rings").mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    totals = {}
    previous = _newest_manifest(run_dir)
    for name, ring in rings.items():
        total = totals[name] = int(ring.total)
        start = oldest = max(0, total - ring.capacity)
        for file, digest in previous["files"].items():
            of, _, stop = _rows_in(file)
            if of == name and oldest < stop <= total:
                files[file] = digest
                start = max(start, stop)
        rows_per_file = max(1, FILE_BYTES // row_bytes(ring))
        for first in range(start, total, rows_per_file):
            stop = min(first + rows_per_file, total)
            file = f"rings/{name}-{first:010d}-{stop:010d}.npz"
            leaves = jax.tree.leaves(read_rows(ring, first, stop))
            files[file] = write_npz(root / file, {str(i): x for i, x in enumerate(leaves)})
    arrays: dict[str, np.ndarray] = {}
    structure = {"tree": [np.asarray(x) for x in jax.tree.leaves(tree)], "host": host}
    encoded = _encode(structure, arrays)
    arrays["json"] = np.frombuffer(json.dumps(encoded).encode(), np.uint8)

    folder = checkpoint_folder(run_dir, env_steps)
    temporary = root / f".writing_{env_steps:010d}"
    for stale in (folder, temporary):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    digest = write_npz(temporary / "state.npz", arrays)
    manifest = {"format": FORMAT, "env_steps": env_steps, "state": digest, "files": files,
                "totals": totals}
    manifest["digest"] = _digest(manifest)
    write_file(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
    temporary.rename(folder)
    _remove_old(run_dir)
    return folder


def load_newest(
    run_dir: Path, tree: Any, rings: dict[str, Ring], say=print
) -> tuple[int, Any, dict[str, Ring], Any]:
    """The newest checkpoint that is whole; damaged ones are named, passed over and removed.

    Args:
        run_dir: the run folder.
        tree: freshly initialised, as a template of structure, shape and dtype.
        rings: freshly initialised and empty. What was saved is written into their memory (they are
            donated), so that loading takes no more of it than training.
        say: where warnings go.

    Returns:
        (env_steps, tree, rings, host), as they were given to `save`.

    Raises:
        UserError: no checkpoint can be used, or the script's networks or rings have changed.
        OSError: the disk cannot be read; nothing is removed.
    """
    root = run_dir / CHECKPOINTS
    if checkpoints(run_dir) and not (root / "rings").exists():
        raise UserError(f"{run_dir} cannot be continued: its replay was deleted when it finished "
                        "(--drop-replay); it can still be evaluated")
    try:
        loaded, passed_over = _newest_whole(
            run_dir, checkpoints(run_dir), lambda folder: _load(root, folder, tree, rings), say
        )
    except MisfitError as error:
        raise UserError(f"{run_dir} cannot be continued by this script, which is not what it was "
                        f"when the run began: of its checkpoint, {error}") from None
    # The run saves these steps again: nothing may build upon the damaged checkpoints of them.
    for folder in passed_over:
        shutil.rmtree(folder, ignore_errors=True)
    return loaded


def drop_replay(run_dir: Path) -> None:
    """Delete the rings of a finished run, and the checkpoints that are not its newest.

    What is left can be evaluated, but not continued.
    """
    root = run_dir / CHECKPOINTS
    for folder in checkpoints(run_dir)[1:]:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root / "rings", ignore_errors=True)


def read_newest(
    run_dir: Path, env_steps: int | None = None, say=print
) -> tuple[int, list[np.ndarray], Any]:
    """A checkpoint's networks and host values without its rings; nothing on disk is changed.

    Args:
        run_dir: the run folder.
        env_steps: which checkpoint; None: the newest that is whole.
        say: where warnings go.

    Returns:
        (env_steps, leaves of the tree given to `save`, host); see `unflatten`.

    Raises:
        UserError: no checkpoint can be used.
        OSError: the disk cannot be read.
    """
    one = [] if env_steps is None else [checkpoint_folder(run_dir, env_steps)]
    (manifest, structure), _ = _newest_whole(
        run_dir, one or checkpoints(run_dir), _read_state, say
    )
    return manifest["env_steps"], structure["tree"], structure["host"]


def unflatten(leaves: list[np.ndarray], tree: Any) -> Any:
    """The tree that `leaves` were, in the structure of `tree` (arrays or ShapeDtypeStructs).

    Raises:
        MisfitError: their number or a shape differs.
    """
    templates = jax.tree.leaves(tree)
    if len(leaves) != len(templates) or any(
        a.shape != np.shape(b) for a, b in zip(leaves, templates, strict=True)
    ):
        raise MisfitError("the networks have other shapes than this script's")
    return jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(x) for x in leaves])


def space_needed(rings: dict[str, Ring], total_timesteps: int) -> int:
    """Bytes that a run's last checkpoint needs; of `rings` only shapes and dtypes are looked at."""
    need = 400 * 2**20  # networks, environments, policies, curves, videos
    for ring in rings.values():
        need += row_bytes(ring) * min(ring.capacity, total_timesteps)
    return need


def free_space(run_dir: Path) -> int:
    """Bytes free on the disk that holds, or will hold, `run_dir`."""
    existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents)
                    if path.exists())
    return shutil.disk_usage(existing).free


def check_space(run_dir: Path, rings: dict[str, Ring], total_timesteps: int) -> None:
    """Make sure that the disk can hold the run's last checkpoint.

    Raises:
        ShortageError: it cannot.
    """
    need = space_needed(rings, total_timesteps)
    free = free_space(run_dir)
    if free < need:
        raise ShortageError(f"the checkpoints of this run need up to {need / 2**30:.1f} GiB in "
                            f"{run_dir}, where {free / 2**30:.1f} GiB are free: choose another "
                            "--run-dir, or a smaller --buffer-size")


def _newest_whole(run_dir: Path, folders: list[Path], load: Callable[[Path], Any], say):
    """(what `load` returns of the first folder that is whole, the damaged ones before it)."""
    for number, folder in enumerate(folders):
        try:
            return load(folder), folders[:number]
        except MisfitError:  # so would the checkpoints before
            raise
        # Other errors of the disk are raised: they may pass, and then the checkpoint is whole.
        except (CheckpointError, FileNotFoundError, ValueError, KeyError,
                zipfile.BadZipFile) as error:
            say(f"warning: checkpoint {folder.name} is passed over: {error}")
    raise UserError(f"{run_dir} has no usable checkpoint ({len(folders)} found): start a new run")


def _read_state(folder: Path) -> tuple[dict, dict]:
    """A checkpoint's manifest, and the leaves of its tree and its host values."""
    manifest = _read_manifest(folder)
    with np.load(io.BytesIO(_read(folder / "state.npz", manifest["state"]))) as file:
        arrays = dict(file)
    return manifest, json.loads(arrays["json"].tobytes(), object_hook=partial(_decode, arrays))


def _load(root: Path, folder: Path, tree: Any, rings: dict[str, Ring]):
    """What `load_newest` returns, of one folder; the entries of `rings` are donated."""
    manifest, structure = _read_state(folder)
    restored_tree = unflatten(structure["tree"], tree)
    if manifest["totals"].keys() != rings.keys():
        raise MisfitError(f"the rings are {', '.join(manifest['totals'])}, this script's "
                          f"{', '.join(rings)}")
    restored_rings = {}
    for name, ring in rings.items():
        files = {root / file: digest for file, digest in manifest["files"].items()
                 if _rows_in(file)[0] == name}
        restored_rings[name] = _fill(ring, files, manifest["totals"][name])
    return manifest["env_steps"], restored_tree, restored_rings, structure["host"]


def _fill(ring: Ring, files: dict[Path, str], total: int) -> Ring:
    """The empty `ring` with the newest rows of `files` up to row number `total`.

    `ring` is donated; `files` are paths and their sha256.
    """
    # A newer checkpoint has begun to fill it, and then a file of it was found to be damaged.
    if any(x.is_deleted() for x in jax.tree.leaves(ring.data)):
        ring = Ring(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ring.data), ring.total)
    for file, digest in files.items():
        _, start, stop = _rows_in(file)
        first = max(start, total - ring.capacity)
        with np.load(io.BytesIO(_read(file, digest))) as stored:
            leaves = [stored[str(i)][first - start:] for i in range(len(stored.files))]
        shapes = [(stop - first, *x.shape[1:]) for x in jax.tree.leaves(ring.data)]
        if [x.shape for x in leaves] != shapes:
            raise MisfitError("the replay's rows have other shapes than this script's")
        # The leaves stay NumPy's until then: on the device they would be there twice.
        ring = add_rows(Ring(ring.data, jnp.asarray(first, jnp.int32)),
                        jax.tree.unflatten(jax.tree.structure(ring.data), leaves))
        # Else the next file would be in memory beside this one: JAX returns before it has written.
        jax.block_until_ready(ring)
        del leaves
    return Ring(ring.data, jnp.asarray(total, jnp.int32))


def _newest_manifest(run_dir: Path) -> dict:
    for folder in checkpoints(run_dir):
        try:
            return _read_manifest(folder)
        except (OSError, CheckpointError):
            continue
    return {"files": {}}


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["digest"] == _digest(manifest) and manifest["format"] == FORMAT:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError("its manifest is damaged or another version's")


def _digest(manifest: dict) -> str:
    """The sha256 over all of a manifest but its own digest."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove_old(run_dir: Path) -> None:
    """Delete all but the newest `KEEP` checkpoints, and what those do not need."""
    root = run_dir / CHECKPOINTS
    kept, old = checkpoints(run_dir)[:KEEP], checkpoints(run_dir)[KEEP:]
    for folder in [*old, *root.glob(".writing_*")]:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        needed = {root / file for folder in kept for file in _read_manifest(folder)["files"]}
    except (OSError, CheckpointError):
        return  # without knowing what is needed, nothing is deleted
    for file in set((root / "rings").iterdir()) - needed:
        file.unlink(missing_ok=True)


def _rows_in(file: str | Path) -> tuple[str, int, int]:
    """The ring of a file of rows, number of its first row, and of the one behind its last."""
    name, start, stop = Path(file).stem.rsplit("-", 2)
    return name, int(start), int(stop)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Write an .npz file; returns its sha256."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(path, buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def _read(path: Path, digest: str) -> bytes:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{path.name} does not match its checksum")
    return data


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """JSON for `value`, its arrays moved to `arrays`."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        name = f"a{len(arrays)}"
        arrays[name] = np.asarray(value)
        return {"__array__": name}
    if isinstance(value, dict):
        return {"__dict__": [[k, _encode(v, arrays)] for k, v in value.items()]}
    if isinstance(value, list):
        return [_encode(v, arrays) for v in value]
    if isinstance(value, tuple):
        return {"__tuple__": [_encode(v, arrays) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _decode(arrays: dict[str, np.ndarray], value: dict) -> Any:
    """What `_encode` wrote as a dict; what is in it has been decoded."""
    if "__array__" in value:
        return arrays[value["__array__"]]
    return tuple(value["__tuple__"]) if "__tuple__" in value else dict(value["__dict__"])
