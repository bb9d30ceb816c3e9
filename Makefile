# FuRL. `make train` and `make test` set up everything they need; see README.md.

# What `make train` runs, e.g. make train TRAIN_ARGS="--env-id drawer-open-v3 --seed 1"
TRAIN_ARGS ?= --env-id drawer-close-v3

VENV := .venv
PY := $(VENV)/bin/python

# 1 installs JAX's CUDA build. Found out from the driver; GPU=0 or GPU=1 overrides.
GPU ?= $(shell if nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ]; then echo 1; else echo 0; fi)
REQUIREMENTS := $(if $(filter 1,$(GPU)),requirements-gpu.txt,requirements.txt)

# Named by what was installed, so that changed pins install again and a mere git checkout does not.
STAMP := $(VENV)/installed-$(GPU)-$(shell cat requirements.txt requirements-gpu.txt | cksum | cut -d' ' -f1)

# Caches (pip's, meshes, prompt embeddings) live below the home folder; without a writable one, here.
ifneq ($(shell [ -n "$$HOME" ] && [ -w "$$HOME" ] && echo yes),yes)
export HOME := $(CURDIR)/$(VENV)/home
endif

.PHONY: help train test setup lint clean

help:
	@echo "make train   set up, then train FuRL: furl_sac_state.py $(TRAIN_ARGS)"
	@echo "make test    set up, then run the tests"
	@echo "make setup   only set up: $(VENV), pinned packages, headless EGL"
	@echo "make lint    ruff"
	@echo "make clean   remove $(VENV) and caches; runs/ is kept"

train: setup
	$(PY) furl_sac_state.py $(TRAIN_ARGS)

test: setup
	@$(PY) -m pytest tests

setup: $(STAMP)
	@tools/install_egl.sh $(PY)

lint: $(STAMP)
	@$(PY) -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP):
	@tools/create_venv.sh $(VENV)
	@rm -f $(VENV)/installed-*
	@echo "Installing $(REQUIREMENTS) (several GB, a few minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@touch $@
