# Thin targets: every one installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
# A folder of local wheels, where pip is configured with one (uv does not read pip's configuration).
export UV_FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo "$$PIP_FIND_LINKS")

.PHONY: demo test lint style bench docs assets clean

demo: .venv/installed
	$(BIN)/apm demo --output_dir apm

test: .venv/installed .venv/browser
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

docs: .venv/installed
	# pdoc reads a module's own dictionary, where names that are loaded on first use appear then.
	$(BIN)/python -c 'from apm_hf import *; from pdoc.__main__ import cli; cli()' --docformat google --output-directory site apm_hf

assets: .venv/installed
	$(BIN)/python scripts/make_demo_teacher.py
	$(BIN)/python scripts/make_demo_model.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

.venv/browser: .venv/installed
	scripts/install_browser.sh
	touch $@

clean:
	rm -rf .venv apm apm_report runs site
