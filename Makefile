# make demo   annotate the bundled clips with the bundled model and write a report
# make test   run the default test suite
# make lint   ruff, pyright, import-linter
# make figures  tables and plots of docs/results from the runs recorded there, and docs/mone.svg
# make clean  remove what these made (not .venv)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-output
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format figures clean lock

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/python -m jobs.annotate bundled/clips/labels.csv --output $(DEMO)
	$(BIN)/python -m jobs.audit $(DEMO)
	$(BIN)/python -m jobs.report $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(INSTALLED)
	for set in docs/results/*/; do $(BIN)/python -m jobs.curves $$set/curves.json --output $$set > /dev/null; done
	$(BIN)/python -m docs.figure

# torch is pinned by version, not by flavour: pip's own settings choose CPU, CUDA or ROCm builds.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Pins of everything, for every Python and platform that we support.
lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --no-annotate --no-emit-index-url --no-header --output-file constraints.txt

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
