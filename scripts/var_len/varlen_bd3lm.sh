#!/usr/bin/env bash
#SBATCH --job-name=varlen_bd3lm
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
# Samples of BD3-LM that end where the model ends them.
# usage: varlen_bd3lm.sh LENGTH SEED BLOCK_SIZE [override ...]
# variables: CHECKPOINT

# Slurm runs a copy of this file; common.sh is then found from the submit folder or the job.
scripts="$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f "$scripts/common.sh" ]] || scripts="${BD3LM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts"
[[ -f "$scripts/common.sh" ]] || scripts="$(dirname "$(scontrol show job "$SLURM_JOB_ID" |
  sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")/.."
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

(($# >= 3)) || die "usage: varlen_bd3lm.sh LENGTH SEED BLOCK_SIZE [override ...]"
LENGTH="$1"
SEED="$2"
BLOCK_SIZE="$3"
shift 3
CHECKPOINT="$(find_checkpoint CHECKPOINT "kuleshov-group/bd3lm-owt-block_size${BLOCK_SIZE}")"

launch \
  loader.eval_batch_size=1 \
  model=small \
  algo=bd3lm \
  algo.backbone=hf_dit \
  algo.T=5000 \
  data=openwebtext-split \
  "model.length=$LENGTH" \
  "block_size=$BLOCK_SIZE" \
  wandb=null \
  mode=sample_eval \
  "eval.checkpoint_path=$CHECKPOINT" \
  model.attn_backend=sdpa \
  "seed=$SEED" \
  sampling.nucleus_p=0.9 \
  sampling.kv_cache=true \
  "sampling.logdir=$ROOT/varlen_sample_logs/samples_genlen_bd3lm_blocksize${BLOCK_SIZE}" \
  sampling.var_length=true \
  "$@"
