# Every target runs in .venv, which is created from pyproject.toml and constraints.txt when it is first needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast check format clean

demo: .venv/installed
	$(BIN)/neko-lean demo --out demo-run --overwrite

test: .venv/installed
	$(BIN)/python -m pytest -m "not cuda" --numprocesses 2 --dist loadfile

test-fast: .venv/installed
	$(BIN)/python -m pytest -m "not slow and not cuda" --numprocesses 2 --dist loadfile

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "neko-lean needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv demo-run
