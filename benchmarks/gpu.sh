#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command of less than 8 minutes on an H200:
#
#     benchmarks/gpu.sh
#
# The tests that need a GPU, training steps (L = 16 and 4, FlexAttention, SDPA and the reference),
# evaluation and sampling. JSON and logs go to benchmarks/results/DATE-DEVICE/. A part that fails
# or takes too long is named at the end, and the others are carried out all the same.
#
# PYTHON is the interpreter (default: the project's .venv, else python), BATCH_SIZE the rows of a
# training step (default 32).
source "$(dirname "$(readlink -f "$0")")/../scripts/common.sh" || exit

BATCH_SIZE="${BATCH_SIZE:-32}"

DEVICE="$("$PYTHON" -c '
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
')"
if [[ -z "$DEVICE" ]]; then
  echo "gpu.sh: PyTorch sees no CUDA device here; nothing was measured" >&2
  exit 1
fi
RESULTS="benchmarks/results/$(date +%F)-$(tr -cs '[:alnum:]' '-' <<<"$DEVICE" | sed 's/-*$//')"
mkdir -p "$RESULTS"
FAILED=()
SECONDS=0

# part NAME LIMIT COMMAND...: carries out one part, for at most LIMIT seconds.
part() {
  local name="$1" limit="$2"
  shift 2
  echo "== $name, $SECONDS s after the start"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$RESULTS/$name.log" || FAILED+=("$name")
}

# train_step NAME LIMIT OPTION...: a training step of bd3lm, small, N = 1,024.
train_step() {
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" "$PYTHON" -m benchmarks.train_step --device cuda --algo bd3lm \
    --model small --length 1024 --batch-size "$BATCH_SIZE" --precision bf16 --compile \
    --json "$RESULTS/$name.json" "$@"
}

part tests 80 "$PYTHON" -m pytest -m gpu -q
train_step train_step_l16 130 --block-size 16 --attn-backend flex sdpa --against reference
train_step train_step_l4 50 --block-size 4 --attn-backend flex
part eval 50 "$PYTHON" -m benchmarks.eval --device cuda --batch-size 16 --precision bf16 \
  --against reference --json "$RESULTS/eval.json"
part search 60 "$PYTHON" -m benchmarks.eval --device cuda --batch-size 16 --precision bf16 \
  --search --steps 2 --against reference --json "$RESULTS/search.json"
part sampling 100 "$PYTHON" -m benchmarks.sampling --device cuda --batch-size 1 64 --compile \
  --json "$RESULTS/sampling.json"

echo "== done after $SECONDS s: $RESULTS"
if ((${#FAILED[@]})); then
  echo "gpu.sh: failed or out of time: ${FAILED[*]}" >&2
  exit 1
fi
