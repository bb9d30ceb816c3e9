# FuRL. `make train` and `make test` set up everything they need; see README.md.

# What `make train` runs, e.g. make train TRAIN_ARGS="--env-id drawer-open-v3 --seed 1"
TRAIN_ARGS = --env-id button-press-topdown-v3 --eval-every 8000 --capture-video

VENV := .venv
PY := $(VENV)/bin/python

# 1 installs JAX's CUDA build. Found out from the driver; `make GPU=0` or `make GPU=1` overrides.
ifneq ($(origin GPU),command line)
GPU := $(shell for p in $(PYTHON) python3.11 python3; do \
	$$p -c "" 2>/dev/null && $$p tools/setup/detect_gpu.py && break; done || echo 0)
endif
LOCK := $(if $(filter 1,$(GPU)),requirements-gpu.lock,requirements.lock)

# Named by what was installed, so that changed pins install again and a mere git checkout does not.
# The requirements count too: those without a lock of theirs are refused.
checksum = $(shell cat $(1) $(1:.lock=.txt) requirements.txt | cksum | cut -d' ' -f1)
STAMP := $(VENV)/installed-$(GPU)-$(call checksum,$(LOCK))

# Caches (pip's, meshes, prompt embeddings) live below the home folder; without a writable one, here.
ifneq ($(shell [ -n "$$HOME" ] && [ -w "$$HOME" ] && echo yes),yes)
export HOME := $(CURDIR)/$(VENV)/home
endif

# Without kept bytecode every start of a script takes 10 s instead of 6 (sac_baseline.py, 2 cores).
unexport PYTHONDONTWRITEBYTECODE

# What `make grid` runs, e.g. make grid GRID_ARGS="table1 --seeds 5"; see docs/grid.md.
GRID_ARGS = --help
GRID_STAMP := $(VENV)/installed-grid-$(call checksum,requirements-grid.lock)

# `make lock` keeps the versions that still fit; make lock LOCK_ARGS=--upgrade takes the newest.
LOCK_ARGS =

.PHONY: help train test doctor grid setup lock lint clean

help:
	@echo "make train   set up, then train FuRL plus: furl_plus_state.py $(TRAIN_ARGS)"
	@echo "make test    set up, then run the tests"
	@echo "make doctor  set up, then check in a minute that this machine can train"
	@echo "make grid    set up, Ray and submitit too, then many runs: GRID_ARGS=\"table1 --seeds 5\""
	@echo "make setup   only set up: $(VENV), locked packages, drawing without a display"
	@echo "make lock    after a change of requirements*.txt: make requirements*.lock again"
	@echo "make lint    ruff"
	@echo "make clean   remove $(VENV), caches and compiled programs; runs/ is kept"

train: setup
	$(PY) furl_plus_state.py $(TRAIN_ARGS)

test: setup $(GRID_STAMP)
	@$(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

doctor: setup
	@$(PY) -m tools.doctor

grid: setup $(GRID_STAMP)
	@$(PY) -m tools.grid $(GRID_ARGS)

setup: $(STAMP)
	@mkdir -p "$$HOME"
	@tools/setup/install_egl.sh $(PY)

# Needs no set-up, which would refuse the old locks.
lock:
	@tools/setup/create_venv.sh $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check "$$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' requirements.txt)"
	@$(PY) tools/setup/lock.py renew $(LOCK_ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	rm -rf "$${FURL_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/furl}/compiled"
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A CUDA build that an earlier set-up left would crash JAX where there is no driver: it is removed.
$(STAMP):
	@tools/setup/create_venv.sh $(VENV)
	@$(PY) tools/setup/lock.py check $(LOCK)
	@rm -f $(VENV)/installed-*
	@[ $(GPU) = 1 ] || $(PY) -m pip uninstall -q -y jax-cuda13-plugin jax-cuda13-pjrt 2>/dev/null
	@echo "Installing $(LOCK) (several GB, a few minutes)"
	@tools/setup/install.sh $(PY) $(LOCK)
	@touch $@

# After $(STAMP), which removes it.
$(GRID_STAMP): $(STAMP)
	@echo "Installing requirements-grid.lock (Ray and submitit, 0.1 GB)"
	@tools/setup/install.sh $(PY) requirements-grid.lock
	@touch $@
