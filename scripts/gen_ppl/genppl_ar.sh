#!/usr/bin/env bash
#SBATCH --job-name=genppl_ar
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
# Generative perplexity of AR: samples, scored by GPT-2 large.
# usage: genppl_ar.sh LENGTH SEED [override ...]
# variables: CHECKPOINT

# Slurm runs a copy of this file; BD3LM_ROOT, the submit folder or the job then lead to common.sh.
at="${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 '/[^ ]*/scripts')}"
at="$(dirname "$(readlink -f "$0")")/..:${BD3LM_ROOT:-$SLURM_SUBMIT_DIR}/scripts:$at/"
PATH="$at:$PATH" source common.sh || exit

find_checkpoint CHECKPOINT ar_owt_noeos.ckpt

launch \
  mode=sample_eval \
  loader.eval_batch_size=1 \
  data=openwebtext-split \
  algo=ar \
  "model.length=$LENGTH" \
  "eval.checkpoint_path=$CHECKPOINT" \
  wandb=null \
  "seed=$SEED" \
  sampling.num_sample_batches=25 \
  sampling.nucleus_p=0.9 \
  "sampling.logdir=$ROOT/sample_logs/samples_ar_len${LENGTH}" \
  sampling.kv_cache=true \
  "$@"
