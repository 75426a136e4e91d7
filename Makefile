# One command everywhere: `make test` runs what CI runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check lint types doctests fast slow chaos bench clean

install: .venv/.installed  ## virtual environment with the millrace command; does nothing the second time

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

demo: install  ## a real broker, a simulated fleet, forecasts live, a picture
	$(BIN)/millrace demo

test: check

check: lint types doctests fast slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

doctests: install
	$(BIN)/python -m pytest -q --doctest-modules pipeline models

fast: install  ## no broker
	$(BIN)/python -m pytest -q -m "not broker"

slow: install  ## on a real broker
	$(BIN)/python -m pytest -q -m broker

chaos: install  ## kills, rebalances, broker deaths; then the oracle. Half an hour
	$(BIN)/python -m tests.chaos

bench: install  ## figures, as ratios to a reference in the same run
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.recovery

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
