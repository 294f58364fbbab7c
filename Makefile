# Two commands on a fresh machine: `make demo` runs the main job, `make test` runs the tests. `make test-all` also
# fetches other people's code that loads converted models, for the tests that `make test` skips without it.
# `make wheel` builds the wheel and runs the demo from it, in an environment and a folder of its own.
# `make docs` builds the site of docs/, where any warning is an error.
# `make mutants` flips signs and comparisons in the core files, and lists those that no test notices.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL ?= demo

.PHONY: demo test test-all consumers wheel docs mutants lint

demo: $(VENV)/ready
	$(BIN)/mmod-convert $(MODEL) --overwrite

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

test-all: $(VENV)/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,harness]'
	$(MAKE) consumers test

consumers: $(VENV)/dev
	$(BIN)/python -m tests.consumers.fetch

wheel: $(VENV)/dev
	rm -rf dist $(VENV)/wheel
	$(BIN)/python -m build
	test $$(cat dist/*.whl | wc -c) -lt 12000000
	$(PYTHON) -m venv $(VENV)/wheel/venv
	$(VENV)/wheel/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd $(VENV)/wheel && PYTHONSAFEPATH=1 venv/bin/mmod demo $(MODEL)

docs: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

mutants: $(VENV)/dev
	$(BIN)/python -m tests.mutants

lint: $(VENV)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
