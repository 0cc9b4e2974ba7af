# Thin targets: every one installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
# A folder of local wheels, where pip is configured with one (uv does not read pip's configuration).
export UV_FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo "$$PIP_FIND_LINKS")

# Python caches what it compiles, even where the environment says otherwise: importing torch and transformers takes about
# twice as long without, and the tests start many processes.
export PYTHONDONTWRITEBYTECODE :=

# Quantisation libraries that some tests load in processes of their own.
APART := torchao bitsandbytes

# torchvision's wheels fit one release of torch each. timm, which needs torchvision, is tested with it.
TORCH ?= 2.14.1
TORCHVISION ?= 0.29.1
TIMM ?= 1.0.31
TORCHVISION_BIN := .venv-torchvision/bin
# Every test file in which pictures become pixel values, through whichever backend there is.
IMAGE_TESTS = $(shell grep -lE 'torchvision|load_teacher|save_clip|[Ii]mage_?[Pp]rocessor|DEMO_|photos?\b' tests/test_*.py)

.PHONY: demo test test-torchvision test-transformers lint style bench docs release-check assets clean

demo: .venv/installed
	$(BIN)/apm demo --output_dir apm

test: .venv/installed .venv/browser
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	# Once more with a stand-in for torchvision, which is not in this environment: the other image processor.
	PYTHONPATH=tests/stubs $(BIN)/python -m pytest -q tests/test_image_processing_apm.py

# About 6 GB of wheels; no part of CI.
test-torchvision: .venv-torchvision/installed
	$(TORCHVISION_BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(IMAGE_TESTS)

# The library's own tests of its models, from its source on the package index; no part of CI.
test-transformers: .venv/installed
	$(BIN)/python scripts/run_transformers_tests.py --work_dir .venv/transformers_tests

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
	# Not --quiet: warnings that are not printed do not count for --strict.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

# Of what is committed; some minutes and gigabytes, no part of CI.
release-check: .venv/installed
	UV=$(CURDIR)/$(BIN)/uv PYTHON=$(PYTHON) scripts/rehearse_release.sh --demo

assets: .venv/installed
	$(BIN)/python scripts/make_demo_teacher.py
	$(BIN)/python scripts/make_demo_model.py
	# scripts/make_dense.py needs a teacher and Caltech-101: its docstring has the command.

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	# Beside the environment: in it, every import of transformers (torchao) or of its Trainer (bitsandbytes) would load
	# them and print to stderr.
	for package in $(APART); do \
		$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-deps --target .venv/$$package $$package || exit 1; \
	done
	touch $@

.venv-torchvision/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torchvision
	grep -v '^torch==' constraints.txt > .venv-torchvision/constraints.txt
	$(TORCHVISION_BIN)/python -m pip install --quiet -c .venv-torchvision/constraints.txt \
		uv torch==$(TORCH) torchvision==$(TORCHVISION)
	$(TORCHVISION_BIN)/uv pip install --quiet --python $(TORCHVISION_BIN)/python \
		-c .venv-torchvision/constraints.txt -e '.[dev]' torch==$(TORCH) timm==$(TIMM)
	touch $@

.venv/browser: .venv/installed
	scripts/install_browser.sh
	touch $@

clean:
	rm -rf .venv .venv-torchvision apm apm_report runs site
