# Every target sets up its own environment in .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WHEEL_TREE := build/typecheck

.PHONY: install demo test check clean

install: $(STAMP)

# Installed again only when pyproject.toml changes.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[train,demo,dev]'
	touch $@

demo: install
	$(BIN)/expunge demo --output_dir demo

test: install
	$(BIN)/python -m pytest

# The editable install is invisible to mypy, so it reads an installed copy.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	rm -rf $(WHEEL_TREE)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(WHEEL_TREE) .
	cd $(WHEEL_TREE) && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p expunge

clean:
	rm -rf build demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
