# Every target sets up what it needs: Python 3.11 or newer, pip and make are enough to start with.
# Nothing has to be activated; whatever environment is active is left alone.

# The first of these that is new enough. Say `make PYTHON=/path/to/python3.12 ...` to choose.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# Where torch comes from; empty: wherever pip looks. On Linux, PyPI's torch is a CUDA build of several GB:
# `make run TORCH_INDEX=https://download.pytorch.org/whl/cpu` takes the small CPU build instead.
TORCH_INDEX ?=
# The release of torch that `make lock` locks.
TORCH_VERSION ?= 2.13.0

# Handed on to the command of a target: make run ARGS="strategy=fedprox rounds=5"
ARGS ?=
# Processes that share the quick tests; 0 runs them in one.
WORKERS ?= 2

IMAGE ?= fl-app:dev
BUILD_ARGS = $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	$(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) \
	$(if $(wildcard wheels/*.whl),--build-arg PIP_ARGS=--no-index)
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

# A template phones nobody, and asks no registry for updates.
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-all check lint format types bench bench-startup bench-deployment bench-privacy lock wheels certs docker-build docker-run clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

run: $(INSTALLED) ## Run the quickstart; change it with ARGS="strategy=fedprox rounds=5"
	$(VENV)/bin/fl-app run experiment=quickstart $(ARGS)

test: $(INSTALLED) ## Run the quick tests (minutes, no network)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(WORKERS) $(ARGS)

test-slow: $(INSTALLED) ## Run only the slow tests: other engines, every experiment
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(ARGS)

test-all: test test-slow ## Run all tests

check: lint types ## Lint, format and types: all that is judged without running the code

lint: $(INSTALLED) ## Report lint and format faults (ruff)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED) ## Mend format and whatever lint can mend (ruff)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(INSTALLED) ## Check types (mypy, strict)
	$(PY) -m mypy

bench: $(INSTALLED) ## Compare seconds per round with others; ARGS="--only mlp --json FILE", PFL_PYTHON=...
	$(PY) tests/bench/bench_round.py $(ARGS)

bench-startup: $(INSTALLED) ## Measure how long runs take to start, on each engine and under flwr run
	$(PY) tests/bench/startup.py $(ARGS)

bench-deployment: $(INSTALLED) ## Measure where the seconds of a deployed round go; ARGS="--soak 100" for a storm of faults
	$(PY) tests/bench/deployment_round.py $(ARGS)

bench-privacy: $(INSTALLED) ## Measure what privacy costs: accuracy against epsilon, seconds a round
	OMP_NUM_THREADS=1 $(PY) tests/bench/privacy_cost.py
	OMP_NUM_THREADS=1 $(PY) tests/bench/ledger_round.py

lock: ## Resolve all versions anew in a throw-away environment and write constraints.txt
	@set -eu; $(require-python); tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	"$(PYTHON)" -m venv "$$tmp/venv"; pip="$$tmp/venv/bin/python -m pip --disable-pip-version-check"; \
	$(if $(TORCH_INDEX),$$pip install --no-deps --index-url "$(TORCH_INDEX)" torch==$(TORCH_VERSION);) \
	$$pip install torch==$(TORCH_VERSION) ".[dev]"; \
	{ echo "# Written by \`make lock\`, never by hand: the exact versions this was tested with on Python 3.11."; \
	  echo "# Use: pip install -c constraints.txt ... Which build of torch it is, CPU or CUDA, is not fixed here."; \
	  $$pip freeze --all --exclude fl-app --exclude pip \
	    | sed -e 's/+.*//' | grep -E -i -v '^(nvidia|cuda|triton)[-=]'; } > "$$tmp/constraints.txt"; \
	cp "$$tmp/constraints.txt" constraints.txt; wc -l constraints.txt

wheels: $(INSTALLED) ## Collect all wheels in wheels/, to build the image where there is no internet
	$(PIP) wheel -q -c constraints.txt -w wheels torch . hatchling
	rm -f wheels/fl_app-*.whl

docker-build: ## Build the container image; uses wheels/ if it is there
	docker build -t $(IMAGE) -f docker/Dockerfile $(BUILD_ARGS) .

# The service that plays the run: run, run-gpu or run-insecure.
RUN ?= run
# The project is named as fl-app run engine=deployment names it, so that keys and ledgers are the same.
PROJECT = $(COMPOSE) -p "$${COMPOSE_PROJECT_NAME:-fl-app}" $(if $(RUN:run=),--profile $(RUN:run-%=%))

docker-run: export OVERRIDES = $(ARGS)
docker-run: docker-build ## Run an experiment on three sites in containers; ARGS as for run, RUN=run-gpu|run-insecure
	@mkdir -p outputs; set -eu; trap '$(PROJECT) down' EXIT; \
	export FL_APP_IMAGE="$(IMAGE)" FL_APP_UID="$$(id -u)" FL_APP_GID="$$(id -g)"; \
	$(PROJECT) run --rm -T $(RUN)

certs: $(INSTALLED) ## Make what keys and certificates are missing in certs/, for a federation without containers
	$(VENV)/bin/fl-app certs make certs $(ARGS)

clean: ## Remove the environment and all caches; outputs/ and wheels/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info *.fab
	find fl_app tests -name __pycache__ -type d -prune -exec rm -rf {} +

define require-python
[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "fl-app needs Python 3.11 or newer: install it, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	|| { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: apt install python3-venv)" >&2; exit 1; }
endef

$(INSTALLED): pyproject.toml constraints.txt
	@$(require-python)
	@echo "Installing into $(VENV): once, and again when pyproject.toml or constraints.txt changes."
	[ -x $(PY) ] || "$(PYTHON)" -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install -q --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch)
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	$(PIP) check
	@touch $@
