# From a fresh clone: `make demo` shows the effect, `make test` proves the code. Both need Python >= 3.11, make, and the network
# once, for `pip install`. Options for what is run go through ARGS: make demo ARGS="--seeds 3", make test ARGS="-k codec".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu lint types check page clean

help:
	@echo "make setup | demo | test | test-gpu | lint | types | check (lint, types and test) | page | clean"

setup: $(INSTALLED)

# Repeated only when what is to be installed has changed: the install is editable, so edits are seen at once.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "atcache needs Python 3.11 or newer, and '$(PYTHON)' is not: name another one with 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/atcache demo $(ARGS)

# Several processes at once, each with whole files: what a file's tests share is made once. Tests here start browsers,
# clusters and servers, and kill processes: on a busy machine one of thousands may run out of patience. What failed is
# said, and runs once more with nothing beside it; what fails again fails.
test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS) || { [ $$? -eq 1 ] && \
		echo "== what failed, once more by itself" && $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(ARGS); }

# The tests that need a GPU, which `make test` leaves out: it gives the same results on every machine.
test-gpu: setup
	ATCACHE_TEST_GPU=1 $(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test

# The page of `atcache view`, from its source in pipelines/view/page to pipelines/view/built, which is committed and
# shipped: only who changes the page needs Node 20 or newer.
page:
	cd pipelines/view/page && npm ci --no-fund --no-audit && npm run build

clean:
	rm -rf $(VENV) build dist atcache.egg-info .pytest_cache .ruff_cache .hypothesis
