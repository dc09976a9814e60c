#!/usr/bin/env bash
# Submits the variable-length jobs of one algorithm: 10 seeds x 50 samples = 500 samples.
# usage: run_varlen_batch.sh ar|bd3lm|sedd [override ...]
# variables: SEEDS, LENGTHS, BLOCK_SIZES (lists in quotes); sbatch reads its own SBATCH_*

# Slurm runs a copy of this file; BD3LM_ROOT, the submit folder or the job then lead to common.sh.
at="${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 '/[^ ]*/scripts')}"
at="$(dirname "$(readlink -f "$0")")/..:${BD3LM_ROOT:-$SLURM_SUBMIT_DIR}/scripts:$at/"
PATH="$at:$PATH" source common.sh || exit

SEEDS="${SEEDS:-1 2 3 4 5 6 7 8 9 10}"
LENGTHS="${LENGTHS:-131072}"
BLOCK_SIZES="${BLOCK_SIZES:-4 8 16}"
SCRIPT="varlen_$ALGO.sh"
if [[ "$ALGO" == sedd ]]; then SCRIPT=recordlen_sedd.sh; fi

submit_each "var_len/$SCRIPT" sampling.num_sample_batches=50 "$@"
