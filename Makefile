# Two commands do everything: `make demo` shows the system at work, `make test` checks it.
# Both create .venv from requirements.lock first; PYTHON picks the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.9
READY := .venv/ready
ARGS ?=

.PHONY: demo test lint bench cluster-tools lock clean

demo: $(READY)
	$(BIN)/trimtab demo $(ARGS)

test: $(READY)
	$(BIN)/pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/lint-imports
	$(BIN)/deptry operator
	$(BIN)/codespell

bench: $(READY)
	$(BIN)/python -m benchmarks

# What the cluster tests start, into a cache outside the tree: 15 minutes once, then nothing.
cluster-tools:
	@tests/cluster/tools/build.sh

# Everything is resolved once, for every platform, with hashes and without download addresses.
lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
	  --python-version 3.11 --all-extras --group dev pyproject.toml -o requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Trimtab needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "python3 cannot create environments here; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
