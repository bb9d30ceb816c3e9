"""How much memory there is for this process and its children, and how much of it is free."""

from pathlib import Path
from typing import NamedTuple

from common.errors import ShortageError, UserError

# What is to stay free beside a run's buffers: programs are compiled, rows are gathered and saved.
RESERVE = 256 * 2**20


class Memory(NamedTuple):
    """Bytes. `free`: what can still be taken, caches given up; `total`: used by anyone or free."""

    free: int
    total: int


def host_memory(
    cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Memory:
    """The machine's, or that of the narrowest control group around this process.

    Args:
        cgroups: folder of all control groups, where the system has them.
        own: file that names those of this process.

    Raises:
        UserError: the system does not say, as on Linux without /proc.
    """
    import psutil  # not above: the doctor says which packages are missing

    try:
        memory = psutil.virtual_memory()
    except OSError as error:
        raise UserError(f"the system does not tell its memory: {error}") from None
    free, total = memory.available, memory.total
    names = {"": ("memory.max", "memory.current", "inactive_file"),  # version 2, then version 1
             "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    try:
        groups = own.read_text().splitlines()
    except OSError:  # macOS
        return Memory(free, total)
    for _, controllers, group in (line.split(":", 2) for line in groups):
        if controllers not in names:
            continue
        limit_file, used_file, cached = names[controllers]
        # In a container the path may be the host's: what exists of it holds, and the mount itself.
        folder = Path(group)
        for part in (folder, *folder.parents):
            here = cgroups / controllers / part.relative_to("/")
            try:
                limit = int((here / limit_file).read_text())
                used = int((here / used_file).read_text())
                stat = (here / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no such group, or "max": no limit
                continue
            reclaimable = sum(int(x.split()[1]) for x in stat if x.split()[0] == cached)
            free, total = min(free, limit - used + reclaimable), min(total, limit)
    return Memory(free, total)


def device_memory() -> Memory | None:
    """That of the device where JAX computes, which on a CPU is the host's; None: unknown."""
    import jax  # not above: the doctor tells of memory without it

    if stats := jax.devices()[0].memory_stats():  # None on a CPU
        return Memory(stats["bytes_limit"] - stats["bytes_in_use"], stats["bytes_limit"])
    try:
        return host_memory()
    except UserError:
        return None


def check_memory(need: int, what: str, remedy: str) -> None:
    """Make sure that `need` bytes can be allocated where JAX computes.

    Linux promises more memory than there is, and ends a program that uses it with a bare "Killed".

    Raises:
        UserError: they can not; a ShortageError if they could when other programs have ended.
    """
    memory = device_memory()
    if memory is None or need + RESERVE <= memory.free:
        return
    error = ShortageError if need + RESERVE <= memory.total else UserError
    raise error(f"{what} needs {need / 2**30:.1f} GiB and a run {RESERVE / 2**30:.2f} GiB beside "
                f"it, but of {memory.total / 2**30:.1f} GiB of memory {memory.free / 2**30:.1f} "
                f"are free: {remedy}")
