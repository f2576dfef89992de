# Two commands do everything: `make demo` and `make test`. Each makes the virtual environment first.
# While working: `make test-fast` (two minutes on two cores) and `make lint`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
CONFIG ?= configs/openmoji.yaml
# Tests side by side, one to a core; those on a real Slurm, which mostly wait, one after the other beside them.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest
SIDE_BY_SIDE = --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-local test-slurm test-fast lint slurm-packages browser-packages format docs site clean

demo: $(VENV)/.demo
	$(BIN)/smalti run $(CONFIG)

test: $(VENV)/.test lint slurm-packages browser-packages
	$(MAKE) --jobs=2 test-slurm test-local

test-local: $(VENV)/.test
	$(PYTEST) $(SIDE_BY_SIDE) -m "not slurm"

test-slurm: $(VENV)/.test
	$(PYTEST) -m slurm

test-fast: $(VENV)/.test
	$(PYTEST) $(SIDE_BY_SIDE) -m "not slow and not slurm"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# The tests marked `slurm` start a real Slurm; its packages come from Debian or Ubuntu, which takes root.
slurm-packages:
	@slurm/testbed install --sacct || echo "without these packages the tests marked slurm are skipped"

# The tests of our pages drive Chromium, Debian's, which takes root.
browser-packages:
	@command -v chromedriver > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	  chromium chromium-driver > /dev/null; } 2> /dev/null || echo "without chromium and chromium-driver the tests of pages are skipped"

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What is generated in docs/; a test says when it is out of date.
docs: $(VENV)/.test
	$(BIN)/python -m pipeline.cli.config_reference > docs/config.md
	$(BIN)/python -m pipeline.cli.python_reference > docs/python-reference.md

# The documentation site, in build/site; a warning is an error. Links to what is no page lead to the repository.
site: $(VENV)/.site
	rm -rf build/docs build/site && mkdir -p build && cp -r docs build/docs
	sed -i 's#](\.\./#](https://github.com/smalti/smalti/blob/main/#g' build/docs/*.md
	$(BIN)/python -m zensical build --strict --clean
	@! grep -rnoE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//[^>]*>' build/site --include='*.html' \
	  || { echo "the site loads something from elsewhere"; exit 1; }

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@ $(VENV)/.demo

$(VENV)/.site: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build .cache *.egg-info
