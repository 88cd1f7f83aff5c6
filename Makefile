# `make demo` and `make test` are all that a fresh clone needs; both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# More arguments for pip when it installs torch, for example another index with CPU-only builds.
TORCH_ARGS ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP)  ## make .venv and install everything at the pinned versions

$(STAMP): pyproject.toml constraints.txt scripts/check_machine.py
	@$(PYTHON) scripts/check_machine.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $(STAMP)

demo: setup  ## six peers learn together in this terminal (ARGS='--peers 4' changes it)
	$(BIN)/p2pfl-torrent demo --peers 6 --rounds 8 --topology mesh $(ARGS)

test: setup  ## all tests (ARGS='tests/core -k picker' for some)
	$(BIN)/python -m pytest -rs $(ARGS)

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## put imports and layout in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## run a benchmark: make bench ARGS='transport --json transport.json'
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove what was built and cached, .venv included
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
