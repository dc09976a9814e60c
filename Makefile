# Everything runs in .venv, which is made on first use and again when requirements.txt or
# constraints.txt changes. The tests also need requirements-eval.txt.
PYTHON ?= python3
FOLDER ?= ../shared/golden
# Which tests: folders, or other arguments of pytest.
TESTS ?=
# The interpreter of `make test-torch211`.
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
# Processes that share the tests; more than eight would wait for memory. Each computes in one thread.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PARALLEL := --numprocesses $(WORKERS) --maxprocesses 8 --dist loadgroup

VENV := .venv
TORCH211 := .venv-torch211
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_TESTS := $(VENV)/.installed-tests
# The versions of constraints.txt are those of Python 3.11; others take what fits requirements.txt.
PINNED := import sys; sys.version_info[:2] == (3, 11) and print('--constraint constraints.txt')
ALL_REQUIREMENTS := --requirement requirements.txt --requirement requirements-eval.txt

.DEFAULT_GOAL := help
.PHONY: help venv venv-tests constraints test test-slow test-torch211 test-gpu test-cluster lint \
	parity quickstart

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 15

venv: $(INSTALLED)  ## create .venv with the exact versions (PYTHON=... picks the interpreter)

$(INSTALLED): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV_PYTHON) -m pip install --requirement requirements.txt $$($(PYTHON) -c "$(PINNED)")
	@touch $@

venv-tests: $(INSTALLED_TESTS)  ## the same with lm-eval and MAUVE, which the tests need

$(INSTALLED_TESTS): $(INSTALLED) requirements-eval.txt
	$(VENV_PYTHON) -m pip install $(ALL_REQUIREMENTS) $$($(PYTHON) -c "$(PINNED)")
	@touch $@

constraints:  ## write constraints.txt anew: what the requirements bring today (Python 3.11)
	$(PYTHON) -m venv --clear $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install $(ALL_REQUIREMENTS)
	{ sed -n '/^#/!q;p' constraints.txt; \
		$(VENV)-constraints/bin/python -m pip freeze --all --exclude pip | sed -E 's/\+[a-z0-9.]+$$//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -r $(VENV)-constraints

test test-slow test-torch211: export OMP_NUM_THREADS := 1

test: venv-tests  ## the default tests
	$(VENV_PYTHON) -m pytest $(PARALLEL) $(TESTS)

test-slow: venv-tests  ## the tests that take minutes each
	$(VENV_PYTHON) -m pytest -m "slow and not gpu and not cluster" $(PARALLEL) $(TESTS)

# By hand, not in CI: torch 2.11 and its libraries take 5 GB.
test-torch211: $(TORCH211)/.installed  ## the default tests of the network's rooms on torch 2.11, Python 3.12
	$(TORCH211)/bin/python -m pytest $(PARALLEL) \
		$(or $(TESTS),tests/models tests/losses tests/sampling tests/training)

$(TORCH211)/.installed: requirements.txt
	$(PYTHON312) -m venv --clear $(TORCH211)
	sed 's/^torch==.*/torch==2.11.0/' requirements.txt > $(TORCH211)/requirements.txt
	$(TORCH211)/bin/python -m pip install --requirement $(TORCH211)/requirements.txt
	@touch $@

test-gpu: venv-tests  ## the tests that need a GPU
	$(VENV_PYTHON) -m pytest -m gpu

test-cluster: venv-tests  ## the tests that start a Slurm (root, and Debian's slurm-wlm and munge)
	$(VENV_PYTHON) -m pytest -m cluster

lint: venv  ## ruff
	$(VENV_PYTHON) -m ruff check .

parity: venv  ## compare with the exact results in FOLDER
	$(VENV_PYTHON) -m tests.parity $(FOLDER)

quickstart: venv  ## train, evaluate and sample a small model on the CPU
	$(VENV_PYTHON) main.py experiment=quickstart
