# Everything that people and CI run. A fresh machine needs Python 3.11 or later and make; `make` alone lists the targets.
#
#   PYTHON     the interpreter that makes .venv      make test PYTHON=python3.12
#   MINUTES    how long `soak` lasts         make soak MINUTES=1
#   ARGS       passed on to the command              make demo ARGS="--data cifar100 --root DIR"
#   PIP_FLAGS  passed on to `pip install`            make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
PIP_FLAGS ?=
ARGS ?=
MINUTES ?= 10
BIN := $(VENV)/bin

.PHONY: help demo test serve check bench soak faults migrate clean

help: ## List the targets (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-train ## Train, fill a gallery and upgrade it under searches; offline, a few minutes; takes ARGS
	$(BIN)/forwardfill demo $(ARGS)

test: $(VENV)/.installed-dev ## Install what the tests need, run `check`, then all tests; ARGS go to pytest
	@$(call install,redis-server)
	@$(call install,chromium)
	@$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

serve: $(VENV)/.installed-postgres ## Run the service and its worker on 127.0.0.1:8000; takes ARGS
	$(BIN)/forwardfill serve $(ARGS)

check: $(VENV)/.installed-dev ## Lint, formatting, types and the order of imports: all that CI checks besides the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-bench ## Measure against FAISS, Chroma and pgvector; exits non-zero where a bar is missed; takes ARGS
	$(BIN)/python -m benchmarks $(ARGS)

soak: $(VENV)/.installed-bench ## Search, write, merge and upgrade for MINUTES, and check every answer; takes ARGS
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

faults: $(VENV)/.installed-dev ## Kill, freeze and starve real processes at every commit step, on both stacks; takes ARGS
	@$(call install,redis-server)
	$(BIN)/python -m tests.faults $(ARGS)

migrate: $(VENV)/.installed-postgres ## Bring the catalog's schema to the newest version (`serve` does so by itself on SQLite)
	$(BIN)/forwardfill migrate $(ARGS)

clean: ## Remove .venv, build/ and every cache; data folders stay
	rm -rf .venv build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra: done again when the dependencies change, otherwise instant. dev holds those that the tests need.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[$*]"
	touch $@ $(if $(filter dev,$*),$(addprefix $(VENV)/.installed-,train postgres))

$(BIN)/python:
	@$(find_python); \
	echo "Making $(VENV) with $$($$python --version)"; \
	$$python -m venv "$(VENV)"

# A name on the PATH proves nothing (it may be a version manager's stub), so each candidate is run.
pythons := python3 python3.14 python3.13 python3.12 python3.11 python

define find_python
python=; \
for candidate in $(or $(PYTHON),$(pythons)); do \
  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "Forwardfill needs Python 3.11 or later, and none of these is one: $(or $(PYTHON),$(pythons)). Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; \
fi; \
if ! "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
  echo "$$($$python --version) at $$(command -v $$python) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; \
fi
endef

# A program that tests need and pip does not have, by the name that it and its package share. Never fails: without it those
# tests are skipped and say so (and CI refuses that for Redis, see .ci/run).
define install
if ! command -v $(1) >/dev/null && command -v apt-get >/dev/null; then \
  if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else sudo=none; fi; \
  if [ "$$sudo" != none ]; then \
    echo "Installing $(1) with apt-get"; \
    install="$$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20"; \
    { $$install install -y --no-install-recommends $(1) || \
      { $$install update && $$install install -y --no-install-recommends $(1); }; } >/dev/null || true; \
  fi; \
fi; \
command -v $(1) >/dev/null || echo "$(1) is not here and could not be installed: the tests that need it will be skipped."
endef
