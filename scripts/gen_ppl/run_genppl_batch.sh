#!/usr/bin/env bash
# Submits the generative-perplexity jobs of one algorithm: 12 seeds x 25 samples = 300 samples.
# usage: run_genppl_batch.sh ar|bd3lm|mdlm|sedd [override ...]
# variables: SEEDS, LENGTHS, BLOCK_SIZES (lists in quotes); sbatch reads its own SBATCH_*

# Slurm runs a copy of this file; common.sh is then found from the submit folder or the job.
scripts="$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f "$scripts/common.sh" ]] || scripts="${BD3LM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts"
[[ -f "$scripts/common.sh" ]] || scripts="$(dirname "$(scontrol show job "$SLURM_JOB_ID" |
  sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")/.."
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

ALGO="${1:-}"
[[ "$ALGO" =~ ^(ar|bd3lm|mdlm|sedd)$ ]] ||
  die "usage: $(basename "$0") ar|bd3lm|mdlm|sedd [override ...]"
shift
read -ra SEEDS <<<"${SEEDS:-1 2 3 4 5 6 7 8 9 10 11 12}"
read -ra LENGTHS <<<"${LENGTHS:-1024 2048}"
read -ra BLOCK_SIZES <<<"${BLOCK_SIZES:-4 8 16}"
script="$ROOT/scripts/gen_ppl/genppl_$ALGO.sh"

# Only bd3lm takes a block size, and sedd takes no length.
if [[ "$ALGO" != bd3lm ]]; then BLOCK_SIZES=(""); fi
if [[ "$ALGO" == sedd ]]; then LENGTHS=(""); fi

for seed in "${SEEDS[@]}"; do
  for length in "${LENGTHS[@]}"; do
    for block_size in "${BLOCK_SIZES[@]}"; do
      submit "$script" ${length:+"$length"} "$seed" ${block_size:+"$block_size"} "$@"
    done
  done
done
