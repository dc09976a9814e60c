#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command of less than 8 minutes:
#
#     benchmarks/gpu.sh [PART ...]
#
# The parts, in the order of their value, by name or number: 1 quickstart, 2 train_step, 3 head,
# 4 sampling, 5 tests, 6 reference, 7 rest. Each has a time limit and writes its result when it has
# one; tables, JSON and logs go to benchmarks/results/DATE-DEVICE/, also as one archive into the
# folder OUT where that is set. `benchmarks/gpu.py` says what each part does.
#
# PYTHON is the interpreter (default: the project's .venv, else python3). BUDGET is how many seconds
# all parts have together (default 480). DEVICE=cpu TINY=1 runs every command at a tiny size without
# a GPU: a rehearsal. Packages that the interpreter lacks are taken from wheels in .whl/.
if [[ -z "${PYTHON:-}" && ! -x "$(dirname "$0")/../.venv/bin/python" ]]; then PYTHON=python3; fi
source "$(dirname "$(readlink -f "$0")")/../scripts/common.sh" || exit

if [[ -d .whl ]] && ! "$PYTHON" -c 'import datasets, hydra, torchdata, zstandard' 2>/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target .site .whl/*.whl
  export PYTHONPATH="$ROOT/.site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
