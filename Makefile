# `make serve` and `make test` work in a fresh clone: both stand on `make setup`.

# The Python that the environment is made from: 3.11 or later.
PYTHON ?= python3
# Where torch comes from, for example TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu".
TORCH_ARGS ?=
PORT ?= 8000
MODEL ?= demo
# More arguments for serve, test, bench and gpu.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup serve test check bench gpu clean

help:
	@echo "make serve    serve MODEL (demo) at PORT (8000)"
	@echo "make test     run the whole test suite"
	@echo "make check    linter, formatter and type checker, changing nothing"
	@echo "make bench    measure serving the demo model"
	@echo "make gpu      on a machine with CUDA and its own python3: run the GPU tests"
	@echo "make setup    create $(VENV); the others do it when needed"
	@echo "make clean    remove $(VENV) and caches"

setup: $(STAMP)
	@:

# torch goes first and alone: any other order lets a package that asks for torch choose the build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "graphllm needs Python 3.11 or later, but $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing torch, the largest package"
	@$(PIP) --progress-bar on $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@echo "Installing graphllm and its other packages (a minute or so)"
	@$(PIP) --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# exec: Ctrl-C reaches the server, which drains and exits with 0.
serve: setup
	@exec $(BIN)/python -m graphllm --model "$(MODEL)" --port "$(PORT)" $(ARGS)

# Two workers, one thread each; a file's tests stay together, so they share its fixtures.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/serving.py $(ARGS)

# Needs torch with CUDA and pytest in $(PYTHON); pytest's plugins may be missing there.
gpu:
	@files=$$(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests || true); \
	if [ -z "$$files" ]; then echo "No test needs a GPU yet: nothing to run."; exit 0; fi; \
	$(PYTHON) -m pytest -o addopts=--import-mode=importlib -W default -m gpu $(ARGS) $$files \
	|| { status=$$?; [ $$status -eq 5 ] && echo "No test needs a GPU yet: nothing was run."; }

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
