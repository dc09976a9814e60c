#!/usr/bin/env bash
# Submits the generative-perplexity jobs of one algorithm: 12 seeds x 25 samples = 300 samples.
# usage: run_genppl_batch.sh ar|bd3lm|mdlm|sedd [override ...]
# variables: SEEDS, LENGTHS, BLOCK_SIZES (lists in quotes); sbatch reads its own SBATCH_*

# Slurm runs a copy of this file; BD3LM_ROOT, the submit folder or the job then lead to common.sh.
at="${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 '/[^ ]*/scripts')}"
at="$(dirname "$(readlink -f "$0")")/..:${BD3LM_ROOT:-$SLURM_SUBMIT_DIR}/scripts:$at/"
PATH="$at:$PATH" source common.sh || exit

SEEDS="${SEEDS:-1 2 3 4 5 6 7 8 9 10 11 12}"
LENGTHS="${LENGTHS:-1024 2048}"
BLOCK_SIZES="${BLOCK_SIZES:-4 8 16}"

submit_each "gen_ppl/genppl_$ALGO.sh" "$@"
