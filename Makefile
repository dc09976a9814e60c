# Everything runs in .venv, which is made on first use and again when requirements.txt changes.
PYTHON ?= python3
FOLDER ?= ../shared/golden

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv test test-slow test-gpu test-cluster lint parity quickstart

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(INSTALLED)  ## create .venv and install requirements.txt (PYTHON=... picks the interpreter)

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV_PYTHON) -m pip install --requirement requirements.txt
	@touch $@

test: venv  ## the default tests
	$(VENV_PYTHON) -m pytest

test-slow: venv  ## the tests that take minutes each
	$(VENV_PYTHON) -m pytest -m "slow and not gpu and not cluster"

test-gpu: venv  ## the tests that need a GPU
	$(VENV_PYTHON) -m pytest -m gpu

test-cluster: venv  ## the tests that start a Slurm (root, and Debian's slurm-wlm and munge)
	$(VENV_PYTHON) -m pytest -m cluster

lint: venv  ## ruff
	$(VENV_PYTHON) -m ruff check .

parity: venv  ## compare with the exact results in FOLDER
	$(VENV_PYTHON) -m tests.parity $(FOLDER)

quickstart: venv  ## train, evaluate and sample a small model on the CPU
	$(VENV_PYTHON) main.py experiment=quickstart
