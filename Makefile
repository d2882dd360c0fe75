# make demo    a small LLaMA on four CPU ranks, beside the same training on one device
# make test    lint and tests; what CI runs
#
# Both set up .venv first: pinned versions, from requirements/constraints.txt.
#   make TORCH=torch==2.11.0 test              another torch (2.11 or later)
#   make PIP_FLAGS="--index-url URL" test      another index, e.g. one with CPU-only or other CUDA builds of torch
#   make PYTHON=python3.12 test                another Python (3.11 or later)
#   make VENV=path demo                        another place for the environment

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist worksteal --durations 25

STAMP := $(VENV)/.stamp
BIN := $(VENV)/bin
# Two cores run two workers; ranks that tests start are single-threaded too.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint check gpu clean

help:
	@awk '!/^#/ {exit} {sub(/^# ?/, ""); print}' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml requirements/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) "$(TORCH)" -e ".[hf,trainer,report,dev]" -c requirements/constraints.txt
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(MAKE) -j2 lint check  # types take a minute of one core: beside the tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: setup
	# What failed beside other tests is run once more alone: real ranks on two busy cores run into time limits.
	$(BIN)/python -m pytest $(PYTEST_FLAGS) || $(BIN)/python -m pytest --last-failed --last-failed-no-failures none

gpu: setup
	$(BIN)/python benchmarks/gpu/run.py
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
