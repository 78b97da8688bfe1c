# make train   installs the package into .venv and compares three initializations of one sparse network
# make test    installs what the tests need as well and runs all of them
# Needs Python 3.11 or later, make and pip, and nothing else. PYTHON=... chooses another interpreter for .venv.

PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test

train: $(VENV)/.installed
	@for init in unit layer dense; do \
	  echo "INIT = $$init"; \
	  $(BIN)/keras-sparse-init train --gin_bindings "INIT='$$init'" --output_dir $(RUNS)/$$init || exit; \
	  echo; \
	done
	@$(BIN)/keras-sparse-init report $(RUNS)/unit $(RUNS)/layer $(RUNS)/dense
	@echo; echo "results in $(RUNS)"

test: $(VENV)/.installed-dev
	TF_NUM_INTRAOP_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The stamps are newer than pyproject.toml as long as what it asks for is installed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[plot]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --upgrade "pip>=25.1"  # The first that knows dependency groups.
	$(BIN)/python -m pip install -e ".[plot]" --group dev
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
