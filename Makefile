# Everything a person does here, a line each; `make quickstart` and `make test` need nothing else done before.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# constraints.txt keeps a CPU build of torch where one is to be had, gigabytes smaller than CUDA's.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart install test test-cluster lint clean

quickstart: $(VENV)/.runtime  ## the main job on a small real corpus, ending with a page to open
	$(BIN)/stride-ray quickstart

install: $(VENV)/.installed  ## a virtual environment with everything, tests and linters included

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed: $(VENV)/.runtime
	$(PIP) --editable '.[dev,gguf]'
	touch $@

test: install  ## the whole test suite, three files at a time, for half of it waits for processes to start
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-cluster: install  ## the long ones: object stores that fail, submitted jobs, nodes that die
	$(BIN)/python -m pytest -m cluster

lint: install  ## formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## what the quickstart and the tools made
	rm -rf quickstart .pytest_cache .ruff_cache .mypy_cache
