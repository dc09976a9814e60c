#!/usr/bin/env bash
#SBATCH --job-name=genppl_bd3lm
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
# Generative perplexity of BD3-LM: samples, scored by GPT-2 large.
# usage: genppl_bd3lm.sh LENGTH SEED BLOCK_SIZE [override ...]
# variables: CHECKPOINT

# Slurm runs a copy of this file; BD3LM_ROOT, the submit folder or the job then lead to common.sh.
at="${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 '/[^ ]*/scripts')}"
at="$(dirname "$(readlink -f "$0")")/..:${BD3LM_ROOT:-$SLURM_SUBMIT_DIR}/scripts:$at/"
PATH="$at:$PATH" source common.sh || exit

find_checkpoint CHECKPOINT "kuleshov-group/bd3lm-owt-block_size${BLOCK_SIZE}"

launch \
  loader.eval_batch_size=1 \
  model=small \
  algo=bd3lm \
  algo.T=5000 \
  algo.backbone=hf_dit \
  data=openwebtext-split \
  "model.length=$LENGTH" \
  "block_size=$BLOCK_SIZE" \
  wandb=null \
  mode=sample_eval \
  "eval.checkpoint_path=$CHECKPOINT" \
  model.attn_backend=sdpa \
  "seed=$SEED" \
  sampling.num_sample_batches=25 \
  sampling.nucleus_p=0.9 \
  sampling.kv_cache=true \
  "sampling.logdir=$ROOT/sample_logs/samples_bd3lm_len${LENGTH}_blocksize${BLOCK_SIZE}" \
  "$@"
