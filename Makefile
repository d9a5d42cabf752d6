# Two commands on a machine with Python 3.11 and nothing else:
#   make demo    a page of pictures, edits and answers in out/index.html
#   make test    style, types and tests
# Both first build .venv from requirements/lock.txt, once; it is rebuilt only when the lock changes. The tests of the web page need Debian's
# Chromium. It is installed if it is missing; where that is impossible, those tests are skipped.

PYTHON ?= python3.11
VENV ?= .venv
OUT ?= out
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per test worker: more threads than cores make everything slower.
unit: export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types unit browser format clean

demo: $(STAMP)
	$(BIN)/hyperbagel demo --out $(OUT)

# The tests come last, so that the output ends with pytest's summary.
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

# torch is installed first and alone, in the build that pip finds for this machine; the lock's version of it is then in place already.
$(STAMP): requirements/lock.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements/lock.txt)"
	$(BIN)/python -m pip install -q -r requirements/lock.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(OUT) .mypy_cache .ruff_cache .pytest_cache
