# Everything runs in .venv, which is made by itself; a clone needs Python 3.11 - 3.13, make and a network (or pip's cache).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first that really runs: version managers leave launchers of versions that aren't there.
ifndef PYTHON
PYTHON := $(firstword $(foreach python,python3.11 python3.12 python3.13 python3,$(shell \
    $(python) -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $(python))))
endif
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cachesvc

key = $(shell { $(PYTHON) -VV; echo '$(1)'; cat /dev/null $(2); } 2>/dev/null | sha256sum | cut -c 1-12)

# An environment is complete when its mark exists, and the mark names what it was made from: where, by which Python, for
# which pyproject.toml.
VENV := .venv
VENV_MARK := $(VENV)/made-from-$(call key,$(CURDIR),pyproject.toml)
BIN := $(CURDIR)/$(VENV)/bin

# LMCache pins another numpy, so it has its own; torch comes first and alone, so that pip takes a CPU build if it knows one.
LMCACHE_PINS := torch==2.13.0 lmcache==0.5.6
LMCACHE := $(CACHE)/bench-lmcache
LMCACHE_MARK := $(LMCACHE)/made-from-$(call key,$(LMCACHE_PINS))

PIP_INSTALL := -m pip install --disable-pip-version-check --progress-bar off --quiet
SOURCES := cachesvc tests $(if $(wildcard bench/*.py),bench) $(wildcard node-agent/node_agent)
BENCHES := arena_bandwidth lookup_latency scaling memory_per_chunk restart

.PHONY: help venv check format test test-unit bench redis bench-env-lmcache clean

help: ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(VENV_MARK) ## the environment for everything below

$(VENV_MARK):
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 - 3.13 found; name one: make PYTHON=/path/to/python'; exit 1; }
	@echo '== .venv: $(PYTHON), the package and its dev extra'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

check: $(VENV_MARK) ## format, lint, types, import contracts, tidy
	@echo '== format'
	@$(BIN)/ruff format --check .
	@echo '== lint'
	@$(BIN)/ruff check .
	@echo '== types'
	@$(BIN)/mypy $(SOURCES)
	@echo '== import contracts'
	@$(BIN)/lint-imports --no-logo
	@echo '== tidy'
	@$(BIN)/python -m pytest -q tests/test_tidy.py

format: $(VENV_MARK) ## mend what can be mended by itself
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

test-unit: $(VENV_MARK) ## what needs no root and little time
	@$(BIN)/python -m pytest -m 'not slow and not root'

test: $(VENV_MARK) redis ## everything, one after another
	@$(BIN)/python -m pytest --durations 10

bench: $(VENV_MARK) redis ## every question of bench/, best on an idle machine
	@test -e $(LMCACHE_MARK) || echo 'LMCache is not installed, its rows will say so (make bench-env-lmcache)'
	@for bench in $(BENCHES); do \
	    echo "== bench/$$bench.py"; \
	    OMP_NUM_THREADS=1 CACHESVC_BENCH_LMCACHE=$(LMCACHE) $(BIN)/python -m bench.$$bench; \
	done

redis: ## a peer of bench, and of its tests
	@command -v redis-server >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends redis-server; } \
	    || echo 'Redis is not installed, its rows will say so (apt-get install redis-server)'

bench-env-lmcache: $(LMCACHE_MARK) ## LMCache for bench, some 2 GB, outside of the checkout
	@echo $(LMCACHE)/bin/python

$(LMCACHE_MARK):
	@echo '== $(LMCACHE): $(LMCACHE_PINS)'
	@rm -rf $(LMCACHE)
	@$(PYTHON) -m venv $(LMCACHE)
	@$(LMCACHE)/bin/python $(PIP_INSTALL) $(firstword $(LMCACHE_PINS))
	@$(LMCACHE)/bin/python $(PIP_INSTALL) $(LMCACHE_PINS)
	@touch $@

clean: ## remove what was made here
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
