"""What every script is measured with: environments, frozen encoders, replay, logs, checkpoints.

Importing it makes the process-wide settings that must stand before JAX, torch or MuJoCo load; each
can be overridden from outside.
"""

import os

# Torch's OpenMP threads would spin after each call and take the cores from XLA and the workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# JAX and torch share one GPU: neither may take all of its memory at start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
