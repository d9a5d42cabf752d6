# Two commands on a machine with Python 3.11 and nothing else:
#   make demo    a page of pictures, edits and answers in out/index.html
#   make test    style, types and tests
# Both build .venv from requirements/lock.txt first, once; it is rebuilt only when the lock changes. The tests of the web page need Debian's
# Chromium, which is installed if it is absent and that is possible; otherwise they are skipped.

PYTHON ?= python3.11
VENV ?= .venv
OUT ?= out
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a test worker: more threads than cores make everything slower.
unit: export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types unit browser format clean

demo: $(STAMP)
	$(BIN)/hyperbagel demo --out $(OUT)

# The tests come last, so that the last line of the output is pytest's.
test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: lint
	$(BIN)/mypy

unit: types browser
	$(BIN)/python -m pytest -q -n $(WORKERS)

browser:
	requirements/chromium.sh

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and alone: pip then takes the build that suits the machine, and the lock finds it in place.
$(STAMP): requirements/lock.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements/lock.txt)"
	$(BIN)/python -m pip install -q -r requirements/lock.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(OUT) .mypy_cache .ruff_cache .pytest_cache
