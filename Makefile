# Everything here needs Python 3.11 or newer and nothing else; packages come from whatever index pip is set up for.
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares a machine without a GPU torch's CUDA libraries.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
INSTALLED := $(VENV)/.installed
DATA := runs/quickstart/data/train.jsonl
WORKERS := 2
# of installed libraries what nothing here imports: their tests, and the model families that are not supported
UNUSED := /tests?/|/transformers/models/(?!auto|bert/|roberta/|xlm_roberta/|electra/|distilbert/)

.DELETE_ON_ERROR:
.PHONY: install quickstart test check clean

install: $(INSTALLED)  ## a virtual environment in .venv with the tested versions

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev,postgresql]'
	# losses are compared with its own in the tests; it asks for tensorboard, which takes no part in that
	$(PIP) --no-deps textbrewer
	# pip would compile on one core; files for later versions of Python fail, as they may
	$(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' $(VENV)/lib || true
	touch $@

quickstart: $(DATA)  ## a search from nothing to a front, in minutes; the same command resumes
	$(BIN)/compress-search run studies/quickstart.yaml

$(DATA): $(INSTALLED) studies/quickstart_data.py
	$(BIN)/python studies/quickstart_data.py $(@D)

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## what the targets above made, except runs/
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
