#!/usr/bin/env bash
#SBATCH --job-name=ppl_zs_owt_bd3lm
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@90
#
# Zero-shot likelihood of BD3-LM trained on OpenWebText.
# usage: ppl_zs_owt_bd3lm.sh [override ...]
# variables: BLOCK_SIZE, CHECKPOINT, DATASETS

# Slurm runs a copy of this file; BD3LM_ROOT, the submit folder or the job then lead to common.sh.
at="${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 '/[^ ]*/scripts')}"
at="$(dirname "$(readlink -f "$0")")/..:${BD3LM_ROOT:-$SLURM_SUBMIT_DIR}/scripts:$at/"
PATH="$at:$PATH" source common.sh || exit

BLOCK_SIZE="${BLOCK_SIZE:-4}"
find_checkpoint CHECKPOINT "kuleshov-group/bd3lm-owt-block_size${BLOCK_SIZE}"

for data in ${DATASETS:-$ZERO_SHOT_DATASETS}; do
  launch \
    loader.eval_batch_size=16 \
    model=small \
    algo=bd3lm \
    algo.backbone=hf_dit \
    "data=$data" \
    +data.insert_valid_eos=False \
    model.length=1024 \
    "block_size=${BLOCK_SIZE}" \
    "eval.checkpoint_path=$CHECKPOINT" \
    wandb=null \
    mode=ppl_eval \
    model.attn_backend=flex \
    "$@"
done
