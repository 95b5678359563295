# Two commands for a newcomer; each does all its own set-up in .venv. Needs python >= 3.10 and make.
#   make demo   the whole path on easy-VQA, about a quarter of an hour on two cores; ends with a report
#   make test   ruff, mypy, import-linter and pytest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
SEED ?= 0
DEMO_OPTIONS ?=

.PHONY: demo test format docs clean

demo: $(VENV)/.installed-demo
	$(BIN)/alignkd demo --out $(OUT) --seed $(SEED) $(DEMO_OPTIONS)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	rm -rf docs/api build/docs
	$(BIN)/python -m sphinx --quiet -b html -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("alignkd needs python 3.10 or newer; set PYTHON=") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
