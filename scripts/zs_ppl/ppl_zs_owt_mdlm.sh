#!/usr/bin/env bash
#SBATCH --job-name=ppl_zs_owt_mdlm
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
# Zero-shot likelihood of MDLM trained on OpenWebText.
# usage: ppl_zs_owt_mdlm.sh [override ...]
# variables: CHECKPOINT, DATASETS

# Slurm runs a copy of this file; common.sh is then found from the submit folder or the job.
scripts="$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f "$scripts/common.sh" ]] || scripts="${BD3LM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts"
[[ -f "$scripts/common.sh" ]] || scripts="$(dirname "$(scontrol show job "$SLURM_JOB_ID" |
  sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")/.."
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

CHECKPOINT="$(find_checkpoint CHECKPOINT "kuleshov-group/mdlm-owt")"
read -ra DATASETS <<<"${DATASETS:-$ZERO_SHOT_DATASETS}"

for data in "${DATASETS[@]}"; do
  launch \
    loader.eval_batch_size=16 \
    model=small \
    algo=mdlm \
    algo.backbone=hf_dit \
    "data=$data" \
    +data.insert_valid_eos=False \
    model.length=1024 \
    "eval.checkpoint_path=$CHECKPOINT" \
    wandb=null \
    mode=ppl_eval \
    "$@"
done
