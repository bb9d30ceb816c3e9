"""Where derived data is kept between runs: simplified meshes, embeddings of prompts, compiled code.

Nothing here is worth a backup: whatever is missing or damaged is computed again.
"""

import hashlib
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from common.system import cpu_description

MAX_BYTES = 2 * 2**30  # of compiled programs


def cache_dir() -> Path:
    """The folder of all caches: $FURL_CACHE_DIR, or `furl` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("FURL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(home or Path.home() / ".cache") / "furl"
    except RuntimeError:  # a user without a home folder, as in some containers
        return Path(tempfile.gettempdir()) / f"furl-{os.getuid()}"


def cached_arrays(
    kind: str, key: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """`compute()`, a dict of arrays, kept on disk under `kind/key` when the disk allows."""
    path = cache_dir() / kind / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except Exception:  # missing or damaged: a cache is only ever recomputed
        pass
    arrays = compute()
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **arrays)
        temporary.replace(path)
    except OSError:  # a read-only home is no reason to stop
        pass
    return arrays


def compilation_cache_dir() -> Path:
    """JAX's compiled programs: one folder for each version of jaxlib and each kind of CPU.

    A program that was compiled for another CPU may crash, so machines that share a home folder
    must not share these.
    """
    # On Linux x86-64, on Linux on ARM, on macOS.
    names = ("model", "flags", "cpu family", "stepping", "Features", "CPU ", "machdep.cpu.")
    lines = cpu_description().splitlines()
    kind = [platform.machine(), *(line for line in lines if line.startswith(names))]
    cpu = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:8]
    return cache_dir() / "compiled" / f"jaxlib-{metadata.version('jaxlib')}-{cpu}"


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles between runs, unless JAX_COMPILATION_CACHE_DIR says where.

    What cannot be read or written there is compiled again without a word. The least used programs
    make room for new ones when the folder holds `MAX_BYTES`.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache_dir()))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.filterwarnings(
        "ignore", message="Error (reading|writing) persistent compilation cache"
    )
