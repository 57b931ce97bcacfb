# A fresh clone needs nothing but this: `make demo` and `make test` make their own environment first.
#
#   PYTHON   the interpreter the environment is made from (3.10 or newer)
#   VENV     where it stands
#   JOBS     processes the tests run in, one thread each
#   ARGS     passed on to fastheads or pytest
#   RESULT   where `make bench` writes its rows
#   GRID     problems of `make grid`
#   LAYERS   where `make lint-layers` lays out the sources as they are installed
#   CXX, SANITIZED   the C++ compiler of `make sanitize`, and the program it builds

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_LATEST ?= .venv-latest
JOBS ?= 2
ARGS ?=
RESULT ?= bench/results/local.json
SANITIZED ?= build/sanitize
GRID ?= 2000
LAYERS ?= build/layers

TESTS_HF := $(addprefix tests/,$(addsuffix .py,hosts/test_huggingface hosts/test_text_encoders hosts/test_forms cli/test_huggingface bench/test_models))

BIN := $(VENV)/bin
PINNED := -c constraints.txt
FOR_TEST := -e '.[demo,test]'
FOR_USE := -e '.[demo,hf,sweep]'
FOR_DEV := -e '.[demo,dev]'
FOR_BENCH := -e '.[demo,bench,test]'
FOR_DOCS := -e '.[docs]'
SOURCES := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-full demo-tune demo-pretrain demo-repeat test test-hf test-oldest test-latest lint lint-format lint-rules lint-types lint-layers format bench bench-check report study sanitize grid ranks kills compile-check compile-report docs dist install-dev clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.for-test ## adapt a small CLIP to icons in a look it never saw, and write a report
	$(BIN)/fastheads demo $(ARGS)

demo-full: $(VENV)/.for-test ## the demo with every method and seed
	$(BIN)/fastheads demo --full $(ARGS)

demo-tune: $(VENV)/.for-test ## the search behind the demo's settings
	$(BIN)/fastheads demo --tune $(ARGS)

demo-repeat: $(VENV)/.for-test ## do the first 200 steps of the pretraining give the committed log's losses? (minutes)
	OMP_NUM_THREADS=1 FASTHEADS_REPEAT=1 $(BIN)/pytest --timeout=0 tests/demo/test_pretraining.py $(ARGS)

demo-pretrain: $(VENV)/.for-test ## make the demo's base model anew, in runs/demo-pretraining (hours on a CPU; goes on where it was killed)
	$(BIN)/python -m fastheads.demo.pretraining $(ARGS)

test: $(VENV)/.for-test ## the tests, on the versions in constraints.txt
	$(call pytest,$(VENV))

test-hf: $(VENV)/.for-test ## the tests of Hugging Face's models, with transformers beside the environment, not in it
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/transformers $(PINNED) transformers tokenizers
	PYTHONPATH=build/transformers OMP_NUM_THREADS=1 $(BIN)/pytest $(TESTS_HF) $(ARGS)

test-oldest: ## the tests, on the oldest versions that setup.py allows (PYTHON=python3.10: the oldest of that too)
	$(call make_venv,$(VENV_OLDEST))
	$(VENV_OLDEST)/bin/uv pip install --compile-bytecode --python $(VENV_OLDEST)/bin/python --upgrade \
	    --resolution lowest-direct $(FOR_USE)
	$(call install,$(VENV_OLDEST),-e '.[test]')
	$(call pytest_whole,$(VENV_OLDEST),oldest)

test-latest: ## the tests, on the newest versions there are
	$(call make_venv,$(VENV_LATEST))
	$(call install,$(VENV_LATEST),--upgrade $(FOR_USE) $(FOR_TEST))
	$(call pytest_whole,$(VENV_LATEST),latest)

lint: lint-format lint-rules lint-types lint-layers ## formatting, ruff's rules, types, who may import whom

lint-format: $(VENV)/.for-dev
	$(BIN)/ruff format --check .

lint-rules: $(VENV)/.for-dev
	$(BIN)/ruff check .

lint-types: $(VENV)/.for-dev
	$(BIN)/mypy

lint-layers: $(VENV)/.for-dev
	@rm -rf $(LAYERS) && mkdir -p $(LAYERS)
	@cp -r fastheads bench $(LAYERS) && cp -r kernels $(LAYERS)/fastheads/kernels
	cd $(LAYERS) && PYTHONPATH=. $(abspath $(BIN))/lint-imports $(CURDIR)/pyproject.toml --no-cache --no-logo

format: $(VENV)/.for-dev ## reformat, and correct what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.for-bench ## fastheads beside its peers: `pytest bench/`, rows in RESULT (ARGS=--full: all shapes, compiled peers)
	$(BIN)/pytest bench --rows $(RESULT) --timeout=0 $(ARGS)

bench-check: $(VENV)/.for-test ## has the CPU path become slower than the base commit? (ARGS='--base REV')
	$(BIN)/python -m bench.check $(ARGS)

report: $(VENV)/.for-test ## docs/performance.md, its figures and README's numbers, from bench/results/
	$(BIN)/python -m bench.report $(ARGS)

study: $(VENV)/.for-test ## docs/study.md and its figures, from docs/results/study-*.json
	$(BIN)/python -m bench.study $(ARGS)

# -O1 keeps the lines of a report; OpenMP stays on, so that what threads share is seen as well.
sanitize: ## csrc/ under the address and undefined-behaviour sanitizers
	@mkdir -p $(dir $(SANITIZED))
	$(CXX) -std=c++17 -O1 -g -fopenmp -fno-math-errno -fsanitize=address,undefined -fno-sanitize-recover=all \
	    -fno-omit-frame-pointer -Wall -Wextra -Icsrc csrc/mmd.cpp tests/csrc/sanitize.cpp -o $(SANITIZED)
	OMP_NUM_THREADS=3 $(SANITIZED)

grid: $(VENV)/.for-test ## the numerics tests over long random grids (GRID problems each; an hour or more on two cores)
	OMP_NUM_THREADS=1 FASTHEADS_GRID=$(GRID) $(BIN)/pytest -n $(JOBS) --timeout=0 tests/ops/test_numerics.py $(ARGS)

ranks: $(VENV)/.for-test ## 200 steps on 1, 2 and 4 processes and in parts: one process's adapters? (minutes on two cores)
	OMP_NUM_THREADS=1 FASTHEADS_RANKS=200 $(BIN)/pytest --timeout=0 tests/train/test_ranks.py $(ARGS)

kills: $(VENV)/.for-test ## 4 processes killed at 20 random times, gone on from by 2: the same adapters, each step once?
	OMP_NUM_THREADS=1 FASTHEADS_KILLS=20 $(BIN)/pytest --timeout=0 tests/train/test_taken_away.py $(ARGS)

compile-check: $(VENV)/.for-test ## the default rows compiled for sm_80 and sm_90: no spills, shared memory, tensor cores
	$(BIN)/python -m bench.compile_report --quick --check --jobs $(JOBS) $(ARGS)

compile-report: $(VENV)/.for-test ## every kernel and tile row for sm_80 and sm_90, without a GPU (half an hour on two cores)
	$(BIN)/python -m bench.compile_report --check --json bench/results/compile.json --doc docs/performance.md $(ARGS)

docs: $(VENV)/.for-docs ## the documentation site, in build/site; fails at a dead link or an undocumented public name
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

dist: $(VENV)/.for-test ## an sdist, and from it this platform's wheel, in dist/
	$(BIN)/uv build $(ARGS)

install-dev: $(VENV)/.for-dev ## the environment of test and lint, without running anything

clean: ## remove builds and caches (environments and runs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# $(call make_venv,folder): an environment of PYTHON, with uv in it; an existing one is left alone.
define make_venv
	@command -v '$(PYTHON)' >/dev/null || { \
	    echo "There is no '$(PYTHON)'. Name a Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "fastheads needs Python 3.10 or newer, and $(PYTHON) is $$('$(PYTHON)' -V 2>&1)." \
	         "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(1)/bin/python || '$(PYTHON)' -m venv $(1)
	@test -x $(1)/bin/uv || $(1)/bin/python -m pip install --quiet $(PINNED) uv \
	    || echo "No uv for this machine: pip installs, more slowly." >&2
endef

# $(call install,folder,arguments): with uv, several times faster than pip; with pip where it can't. Bytecode at once, as
# pip does: where PYTHONDONTWRITEBYTECODE is set, every process would compile torch's and open_clip's sources for itself.
define install
	{ test -x $(1)/bin/uv && $(1)/bin/uv pip install --compile-bytecode --python $(1)/bin/python $(2); } \
	    || $(1)/bin/python -m pip install $(2)
endef

# $(call pytest,folder). One thread a process, or they get in each other's way; worksteal: neighbouring
# tests stay in one process, where they share fixtures.
define pytest
	OMP_NUM_THREADS=1 $(1)/bin/pytest -n $(JOBS) --dist worksteal --benchmark-disable $(ARGS)
endef

# $(call pytest_whole,folder,name): and how it ended goes into the table of versions, where ARGS chose no part.
define pytest_whole
	$(call pytest,$(1)) $(if $(ARGS),,--junitxml=build/tests-$(2).xml; status=$$?; \
	    $(1)/bin/python -m bench.versions $(2) build/tests-$(2).xml --json bench/results/versions.json \
	    --doc docs/questions.md; exit $$status)
endef

# The stamps: made once, and again where what is installed changed.
$(VENV)/.for-test: $(SOURCES)
	$(call make_venv,$(VENV))
	$(call install,$(VENV),$(PINNED) $(FOR_TEST))
	@touch $@

$(VENV)/.for-dev: $(SOURCES)
	$(call make_venv,$(VENV))
	$(call install,$(VENV),$(PINNED) $(FOR_DEV))
	@touch $@ $(VENV)/.for-test

$(VENV)/.for-bench: $(SOURCES)
	$(call make_venv,$(VENV))
	$(call install,$(VENV),$(PINNED) $(FOR_BENCH))
	@touch $@ $(VENV)/.for-test

$(VENV)/.for-docs: $(SOURCES)
	$(call make_venv,$(VENV))
	$(call install,$(VENV),$(PINNED) $(FOR_DOCS))
	@touch $@
