# Sheepfold's house-keeping. `make help` lists the targets; each sets up what it needs.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where to take torch from; empty means wherever pip is configured to look.
TORCH_INDEX ?=
# Passed on to the command of `demo`, `test` and `test-all`.
ARGS ?=
# Processes that run tests; each has one thread.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := protocol privacy quant edge_agent aggregator_server simulations
# Folders too, so that a deleted file is noticed.
SOURCES := $(shell find $(PACKAGES) -name __pycache__ -prune -o -print)
TORCH := $(shell grep '^torch==' constraints.txt)

WHEEL := $(VENV)/wheel/sheepfold-*.whl
BUILD_WHEEL = rm -rf $(VENV)/wheel && $(PIP) wheel --quiet --no-cache-dir --no-deps \
	--no-build-isolation --wheel-dir $(VENV)/wheel .

# Tests see the installed wheel, never the working tree, and never the network.
TEST_ENV := PYTHONPATH= PYTHONSAFEPATH=1 SHEEPFOLD_INSTALLED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadfile
# The variable silences an announcement of the theme's authors, nothing about our pages.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Peers for benchmarks, apart from everything of ours.
PEERS := .venv-bench

.PHONY: help setup setup-bench demo test test-all lint docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@printf '\nOptions: PYTHON=…  TORCH_INDEX=URL (which build of torch)  ARGS="…"  WORKERS=N\n'

setup: $(VENV)/.sheepfold ## create .venv with everything, Sheepfold itself as a built wheel

setup-bench: $(PEERS)/.installed ## create .venv-bench with the peers that benchmarks compare with

demo: $(VENV)/.sheepfold ## a server and five agents on this machine, from base model to adapter
	$(BIN)/sheepfold-sim demo $(ARGS)

test: $(VENV)/.sheepfold ## the tests that take minutes
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.sheepfold ## all tests
	$(PYTEST) $(ARGS)

lint: $(VENV)/.requirements ## ruff, mypy --strict, import contracts, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MKDOCS) --quiet --site-dir .cache/site

docs: $(VENV)/.requirements ## build the documentation into site/
	$(MKDOCS)

clean: ## remove .venv, caches and built files
	rm -rf $(VENV) $(PEERS) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache \
		build dist site

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and alone: any build of it satisfies the pin, so nothing later replaces it.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

# `make` builds the wheel itself: handed a folder called something like my-clone, pip takes it for a
# release and may install what it built there last time.
$(VENV)/.requirements: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt hatchling
	$(BUILD_WHEEL)
	$(PIP) install --constraint constraints.txt "$$(echo $(WHEEL))[agent,server,sim,dev]"
	touch $@

# Not an editable install: what is tested is what is shipped.
$(VENV)/.sheepfold: $(VENV)/.requirements README.md LICENSE $(SOURCES)
	$(BUILD_WHEEL)
	$(PIP) install --quiet --no-deps --force-reinstall $(WHEEL)
	touch $@

# torch first and alone, as above.
$(PEERS)/.installed: benchmarks/constraints-peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install $(TORCH) \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PEERS)/bin/python -m pip --disable-pip-version-check install \
		--constraint benchmarks/constraints-peers.txt 'flwr[simulation]' 'pfl[pytorch]'
	touch $@
