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
# LlamaIndex wants an older openai package than the one that the other tests drive.
LLAMA_INDEX := $(VENV)/llama-index
LLAMA_INDEX_PINS := tests/e2e/llama_index_requirements.txt
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
# A CUDA build of torch brings the triton that it was built for, which then takes the place of our pin.
OUR_PINS := import re, importlib.metadata as metadata; \
  has_own = any(re.match(r"triton\b", line) for line in metadata.requires("torch") or ()); \
  print(*(line for line in open("constraints.txt") if not (has_own and line.startswith("triton=="))), sep="", end="")
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "graphllm needs Python 3.11 or later, but $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing torch, the largest package"
	@$(PIP) --progress-bar on $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@echo "Installing graphllm and its other packages (a minute or so)"
	@$(BIN)/python -c '$(OUR_PINS)' > $(VENV)/constraints.txt
	@# compat: a path entry, which a folder called graphllm in the working directory does not shadow.
	@$(PIP) --quiet -c $(VENV)/constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@touch $(STAMP)

$(LLAMA_INDEX)/.installed: $(LLAMA_INDEX_PINS) | $(STAMP)
	@echo "Installing LlamaIndex beside it, for one of the tests"
	@$(PYTHON) -m venv --clear $(LLAMA_INDEX)
	@$(LLAMA_INDEX)/bin/python -m pip install --disable-pip-version-check --no-input --quiet --no-deps \
	  -r $(LLAMA_INDEX_PINS)
	@touch $@

# exec: Ctrl-C reaches the server, which drains and exits with 0 (make itself then reports 130).
serve: setup
	@exec $(BIN)/python -m graphllm --model "$(MODEL)" --port "$(PORT)" $(ARGS)

# Two suites, because a process either compiles Triton's kernels or interprets them. One after the other,
# with two workers each and a thread a worker: side by side, the shorter would leave a core idle.
# A file's tests stay together in the plain suite and share its fixtures; the kernels' tests share nothing.
# ARGS may choose tests of one suite only (exit 5: none selected), but not of neither.
test: setup $(LLAMA_INDEX)/.installed
	@counts=$$(mktemp); trap 'rm -f "$$counts"' EXIT; trap 'exit 130' INT; failed=0; empty=0; \
	suite() { \
	  env OMP_NUM_THREADS=1 GRAPHLLM_TEST_COUNTS="$$counts" "$$@" || \
	  if [ $$? -eq 5 ]; then empty=$$((empty + 1)); else failed=1; fi; }; \
	suite TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS); \
	suite TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS); \
	echo "== $$(paste -s -d ';' "$$counts" | sed 's/;/; /g')"; \
	[ $$failed -eq 0 ] && [ $$empty -lt 2 ]

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/serving.py $(ARGS)

# Needs a CUDA device, a C compiler, and the packages and headers of $(PYTHON): no $(VENV), no network.
# PART=compile, kernels, graphs, e2e, bench or peers runs one of the parts, and compile before those that load
# models; ARGS=--list says what would be run.
gpu:
	@$(PYTHON) tools/gpu.py $(PART) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
