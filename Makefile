# `make demo` and `make test` set up their own environment: Python 3.11+ and git are all they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= demo-out

.PHONY: demo test test-slow check peers clean

# libtpu (a compiler for TPUs; none is needed) lies apart: JAX would look for a TPU whenever it can import it.
# torch first and by its exact version: a range would fetch the newest build, with several GB of CUDA packages.
.venv/.test: .venv/.base
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test]'
	$(PIP) --target .venv/tpu --upgrade libtpu || echo "no libtpu for this platform: tests that compile for TPUs skip"
	touch $@

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

demo: .venv/.base
	$(BIN)/unlearnjax demo --out $(OUT)

# Two workers: most of the time is XLA compiling, which leaves a core idle now and then.
test: check
	$(BIN)/python -m pytest -n 2 -m 'not slow'

# The rest: whole runs, kill drills, parity over many updates.
test-slow: .venv/.test
	$(BIN)/python -m pytest -n 2 -m slow

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mergekit, for tests/parity/test_mergekit_yaml.py and benchmarks: its pins do not suit ours.
peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 mergekit==0.1.4 'transformers<5'

clean:
	rm -rf .venv .venv-peers demo-out .mypy_cache .ruff_cache .pytest_cache
