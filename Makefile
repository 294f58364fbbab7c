# Two commands on a fresh machine: `make demo` runs the main job, `make test` runs the tests. `make test-all` also
# fetches other people's code that loads converted models, for the tests that `make test` skips without it.
# `make mutants` flips signs and comparisons in the core files, and lists those that no test notices.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL ?= demo

.PHONY: demo test test-all consumers mutants lint

demo: $(VENV)/ready
	$(BIN)/mmod-convert $(MODEL) --overwrite

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

test-all: $(VENV)/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev,harness]'
	$(MAKE) consumers test

consumers: $(VENV)/dev
	$(BIN)/python -m tests.consumers.fetch

mutants: $(VENV)/dev
	$(BIN)/python -m tests.mutants

lint: $(VENV)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu]'
	touch $@

$(VENV)/dev: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev]'
	touch $@
