# Every target sets up its own environment in .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
COPY := build/installed

.PHONY: install demo test check emoji clean

install: $(STAMP)

# Installed again only when pyproject.toml changes.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[train,demo,dev]'
	touch $@

demo: install
	$(BIN)/expunge demo --output_dir demo

test: install
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# An editable install shows mypy and import-linter no rooms, so both read an installed copy.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(COPY) .
	cd $(COPY) && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml
	cd $(COPY) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p expunge

# The bundled model, from its sources: needs npm, and a few hours of two cores.
emoji: install
	$(BIN)/python -m pip install --quiet --editable '.[emoji]'
	PYTHON=$(CURDIR)/$(BIN)/python scripts/emoji/build.sh $(or $(WORK),runs/emoji)

clean:
	rm -rf build demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
