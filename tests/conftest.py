"""Tests run from any folder, keep caches out of the home folder's way, and leave cores free."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Runs of one test differ in arguments alone, not in what is compiled.
compiled = tempfile.TemporaryDirectory(prefix="furl-tests-")  # until the tests end
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
