# Two commands do everything: `make demo` and `make test`. Both make the virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
CONFIG ?= configs/openmoji.yaml

.PHONY: demo test lint slurm-packages format clean

demo: $(VENV)/.demo
	$(BIN)/smalti run $(CONFIG)

test: $(VENV)/.test lint slurm-packages
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests marked `slurm` start a real Slurm; its packages come from Debian or Ubuntu, which takes root.
slurm-packages:
	@slurm/testbed install --sacct || echo "without these packages the tests marked slurm are skipped"

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info
