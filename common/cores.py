"""Who gets how many threads: decided here, once, from the number of cores.

Three parts of an iteration compute. The environments' workers (physics, software drawing) are one
process a core with one thread each. torch (the frozen VLM) and XLA (the updates) take turns, since
updates learn from what has just been embedded: each gets as many threads as there are cores. Only
the workers run beside them.

FURL_NUM_CORES overrides the number of cores; NPROC and OMP_NUM_THREADS, if set, that of XLA's and
of torch's threads alone.
"""

import math
import os
from pathlib import Path

from common.errors import UserError
from common.system import usable_cores

OVERRIDE = "FURL_NUM_CORES"
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# For a worker's environment: neither numerics (VECLIB is macOS's) nor Mesa's software renderer, if
# that is what draws, may start threads of their own.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1",
              "LP_NUM_THREADS": "0"}


def num_cores() -> int:
    """Cores that this process may use: by its affinity and its container's quota.

    Raises:
        UserError: FURL_NUM_CORES is no positive whole number.
    """
    chosen = os.environ.get(OVERRIDE)
    if chosen:
        if not chosen.isdecimal() or int(chosen) < 1:
            raise UserError(f"{OVERRIDE} must be a whole number, 1 or more, not {chosen!r}")
        return int(chosen)
    cores = usable_cores()
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores


def share_cores() -> None:
    """Tell XLA and torch: before torch is imported, and before JAX computes."""
    for variable in ("NPROC", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, str(num_cores()))
