# Commands for a newcomer; each does all its own set-up in .venv. Needs python >= 3.11 and make.
#   make demo        the whole path on easy-VQA, about a quarter of an hour on two cores; ends with a report
#   make test        make check, and every test that is not slow: under ten minutes on two cores
#
# And for a developer; tests/README.md says more:
#   make check       ruff, mypy, import-linter: under a minute once their caches are warm
#   make test-fast   the method, local caches, two families and one run of both stages: under two minutes
#   make test-slow   real kills, several processes, Ray, DeepSpeed, the whole demo, a clean installation
#   make docs        the documentation as a site, in build/docs
#   make coverage    the tests of make test once more, with a report of the lines that none of them ran

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
SEED ?= 0
DEMO_OPTIONS ?=

# Test processes: one more than there are processors, since many tests wait for processes of their own. Slow tests do so more.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
SLOW_WORKERS ?= 2
# More options for pytest, for example PYTEST_OPTIONS=--durations=20.
PYTEST_OPTIONS ?=

# One thread a test process: models are tiny, and the processes share the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist worksteal $(PYTEST_OPTIONS)
PARALLEL = -n $(WORKERS) --maxprocesses 8

.PHONY: demo check test test-fast test-slow coverage format docs clean

demo: $(VENV)/.installed-demo
	$(BIN)/alignkd demo --out $(OUT) --seed $(SEED) $(DEMO_OPTIONS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(PYTEST) $(PARALLEL) -m "not slow"

FAST := tests/method tests/cache_store \
	tests/families/test_families_conformance.py \
	tests/pipeline/test_cli_settings.py::test_one_file_runs_both_stages

test-fast: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) -m "not slow and not s3" -k "not TestFamilies or [llava] or [mobilevlm_v1]" $(FAST)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -n $(SLOW_WORKERS) -m slow

# Apart from make test, and not in CI: tracing nearly doubles the processor time of the tests.
coverage: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) -m "not slow" --cov --cov-report=term-missing

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	rm -rf docs/api build/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("alignkd needs python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
