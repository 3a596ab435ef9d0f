# `make mtil` and `make test` install everything they need into .venv, at the versions of requirements.lock.
#   PYTHON=python3.12        another interpreter (3.10 or newer)
#   TORCH_INDEX=ADDRESS      take torch from this index, for example the one of CPU builds that pytorch.org names
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
PIP_INSTALL := -m pip install --no-compile --quiet --disable-pip-version-check
TORCH_INDEX ?=
export PYTHONDONTWRITEBYTECODE := # compiled modules are kept: to compile the libraries takes longer than to run most commands

.PHONY: mtil test pytest lint test-latest update clean

mtil: $(VENV)/ready
	$(BIN)/mulki run recipes/mtil.yaml

# The linters use one core for a minute, so they run beside the tests.
test: $(VENV)/ready-dev
	$(MAKE) --no-print-directory --jobs=2 lint pytest

pytest: $(VENV)/ready-dev
	$(BIN)/python -m pytest

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests with the newest release of every dependency, in an environment of its own.
test-latest: $(LATEST)/bin/python
	$(LATEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[mini,dev]'
	$(LATEST)/bin/python -m pytest

# Renews requirements.lock for every supported Python and platform.
update: $(VENV)/bin/python
	$(BIN)/python $(PIP_INSTALL) --upgrade uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra mini --extra dev \
	  --no-emit-index-url --no-header --no-annotate --output-file requirements.lock pyproject.toml

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "MulKI needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $* || { rm -rf $*; exit 1; }

$(VENV)/torch: requirements.lock | $(VENV)/bin/python
	$(if $(TORCH_INDEX),$(BIN)/python $(PIP_INSTALL) --constraint requirements.lock --extra-index-url $(TORCH_INDEX) torch torchvision)
	@touch $@

$(VENV)/ready: pyproject.toml requirements.lock $(VENV)/torch
	$(BIN)/python $(PIP_INSTALL) --constraint requirements.lock -e '.[mini]'
	@touch $@

$(VENV)/ready-dev: pyproject.toml requirements.lock $(VENV)/torch
	$(BIN)/python $(PIP_INSTALL) --constraint requirements.lock -e '.[mini,dev]'
	@touch $@ $(VENV)/ready

clean:
	rm -rf $(VENV) $(LATEST) build *.egg-info
