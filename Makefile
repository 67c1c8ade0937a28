# `make help` lists the verbs. Every verb does its own set-up.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
UV := $(BIN)/uv
# A file's tests stay together: what its fixtures make is made once.
PARALLEL := --numprocesses=auto --dist=loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-faults test-browser test-cluster test-all screenshots lint format type-check lock bench ui clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv and fill it from requirements.lock

# Compiling byte code once here keeps it out of the start of every Ray worker.
$(READY): requirements.lock pyproject.toml
	@echo "setting up .venv (about 6 GB with torch's CUDA libraries; minutes on the first call)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-uv.lock
	UV_COMPILE_BYTECODE=1 $(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## generate scenes, train on them on two workers, show the result (about 10 minutes)
	$(BIN)/mimiclab demo

ui: $(READY) ## MLflow's pages of the runs made here
	$(BIN)/mimiclab ui

# Two processes: in one that is connected to Ray, arrow talks to S3 otherwise.
test: $(READY) ## all tests but those that take minutes each
	$(BIN)/pytest $(PARALLEL) -m "not long" tests/unit
	$(BIN)/pytest -m "not long" tests/integration

test-fast: $(READY) ## tests that need neither a cluster nor a server, and no patience
	$(BIN)/pytest $(PARALLEL) -m "not cluster and not server and not slow and not long"

test-faults: $(READY) ## tests that kill, fill and cut off what a run stands on
	$(BIN)/pytest -m "not long" tests/faults

test-browser: $(READY) ## tests that open MLflow's pages in Chromium (Debian: apt-get install chromium)
	$(BIN)/pytest tests/browser

test-cluster: $(READY) ## the whole story on a cluster of three nodes here: search, drain, promote, train, kill, go on
	$(BIN)/pytest tests/cluster

test-all: $(READY) ## every test
	$(BIN)/pytest $(PARALLEL) tests/unit
	$(BIN)/pytest tests/integration
	$(BIN)/pytest tests/faults
	$(BIN)/pytest tests/browser
	$(BIN)/pytest tests/cluster

screenshots: $(READY) ## docs/*.png of MLflow's pages, of a small store or of TRACKING=sqlite:///mlflow.db
	PYTHONPATH=tests/support $(BIN)/python tests/browser/screenshots.py $(TRACKING)

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type-check: $(READY) ## mypy, strict
	$(BIN)/mypy

bench: $(READY) ## the short form of the benchmarks
	$(BIN)/python experiments/benchmarks/inference.py --short
	$(BIN)/python experiments/benchmarks/training.py --short
	$(BIN)/python experiments/benchmarks/evaluation.py --images 300 --rounds 1

clean: ## remove caches and build outputs; runs, data and .venv stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis test-output dist
	find models platform tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

lock: ## renew requirements.lock and requirements-uv.lock from pyproject.toml
	test -x $(UV) || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv; }
	echo uv | $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --upgrade --python-version 3.11 - -o requirements-uv.lock
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --upgrade --python-version 3.11 --extra dev pyproject.toml -o requirements.lock
