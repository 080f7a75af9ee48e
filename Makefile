# Needs make and Python 3.11 or newer, nothing else prepared. Everything is installed into .venv; a second run installs nothing.

# The first of these that is new enough makes .venv: make demo PYTHON=/path/to/python3
PYTHON ?= python3.13 python3.12 python3.11 python3

BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# A stamp stands once its installation has succeeded, and falls when what is to be installed changes.
CORE = .venv/.core-installed
ALL = .venv/.all-installed

.PHONY: help demo test lint docs bench package clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1	/p' Makefile

demo: $(CORE)  ## make a trained network faster, and show the proof
	$(BIN)/lamina demo

test: $(ALL)  ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(ALL)  ## style, types, order of the rooms, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

docs: $(ALL)  ## build the documentation into site/
	$(BIN)/mkdocs build --strict --site-dir site

bench: $(ALL)  ## list the commands behind the numbers in docs/results.md
	@for script in benchmarks/*.py benchmarks/gross/*.py benchmarks/faults/*.py benchmarks/published/*.py; do \
	  command=$$(sed -n 's|^    python \(benchmarks/.*\)|$(BIN)/python \1|p' "$$script"); \
	  if [ -n "$$command" ]; then echo "$$command"; fi; \
	done

package: $(ALL)  ## build the wheel and the source archive, and try them in empty environments
	.ci/package

clean:  ## remove what was built; timings taken and .venv stay
	rm -rf dist site .venv/site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis examples/demo/out
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE): pyproject.toml constraints.txt
	@set -e; new_enough='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if $(BIN)/python -c "$$new_enough" && $(BIN)/python -m pip --version; then exit 0; fi >/dev/null 2>&1; \
	for python in $(PYTHON); do \
	  if $$python -c "$$new_enough" >/dev/null 2>&1; then \
	    echo "making .venv with $$($$python --version)"; \
	    exec $$python -m venv --clear .venv; \
	  fi; \
	done; \
	echo "lamina needs Python 3.11 or newer with its venv module; none of these is: $(PYTHON)." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name one: make demo PYTHON=/path/to/python3" >&2; \
	exit 1
	@echo "installing lamina into .venv; PyTorch is large, so the first time takes minutes"
	$(INSTALL) -e ".[train,export,openvino,report]"
	@touch $@

$(ALL): $(CORE) benchmarks/published/requirements.txt
	@echo "installing what the tests need into .venv"
	$(INSTALL) -e ".[zoo,train,lightning,search,export,openvino,executorch,report,dev,bench]"
	$(INSTALL) --no-deps -r benchmarks/published/requirements.txt
	@touch $@
