#!/usr/bin/env bash
#SBATCH --job-name=train_owt_sedd
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=4
#SBATCH --time=96:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@90
#
# Trains SEDD on OpenWebText.
# usage: train_owt_sedd.sh [override ...]

# Slurm runs a copy of this file; BD3LM_ROOT, the submit folder or the job then lead to common.sh.
at="${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 '/[^ ]*/scripts')}"
at="$(dirname "$(readlink -f "$0")")/..:${BD3LM_ROOT:-$SLURM_SUBMIT_DIR}/scripts:$at/"
PATH="$at:$PATH" source common.sh || exit

launch \
  loader.global_batch_size=512 \
  loader.eval_global_batch_size=512 \
  loader.batch_size=16 \
  loader.eval_batch_size=16 \
  model=small \
  algo=sedd \
  data=openwebtext-split \
  data.insert_train_special=False \
  data.insert_valid_special=False \
  data.insert_valid_eos=False \
  model.length=1024 \
  wandb.name=sedd-owt \
  "$@"
