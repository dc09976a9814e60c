#!/usr/bin/env bash
#SBATCH --job-name=ssdlm
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
# The SSD-LM samples of the paper's table of generative perplexity: per length, number of steps
# and seed one job, which draws 25 samples and scores them. Through Slurm where there is one, else
# here, one job after the other. A job that is started again goes on after the last finished batch.
# usage: run_generate_text_batch.sh [option of generate_text.py ...]       all jobs
#        run_generate_text_batch.sh job LENGTH T SEED [option ...]         one of them, here
# variables: MODEL, SCORER (Hub id or directory), SEEDS, LENGTHS, STEPS (lists in quotes)

# Slurm runs a copy of this file; BD3LM_ROOT, the submit folder or the job then lead to common.sh.
at="${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 '/[^ ]*/ssd-lm')}"
at="${BD3LM_ROOT:-$SLURM_SUBMIT_DIR}/scripts:$at/../scripts"
at="$(dirname "$(readlink -f "$0")")/../scripts:$at"
PATH="$at:$PATH" source common.sh || exit

# Jobs start in the project's root, where a relative path of the caller would name nothing.
MODEL="${MODEL:-xhan77/ssdlm}"
if [[ -e "$INVOKED_FROM/$MODEL" ]]; then MODEL="$INVOKED_FROM/$MODEL"; fi
SCORER="${SCORER:-gpt2-large}"
if [[ -e "$INVOKED_FROM/$SCORER" ]]; then SCORER="$INVOKED_FROM/$SCORER"; fi
export MODEL SCORER

if [[ "${1:-}" == job ]]; then
  (($# >= 4)) || die "usage: $(basename "$0") job LENGTH T SEED [option of generate_text.py ...]"
  samples="$ROOT/sample_logs/samples_ssdlm_len$2_T$3/seed$4.json"
  "$PYTHON" -u ssd-lm/generate_text.py \
    --model "$MODEL" \
    --length "$2" \
    --T "$3" \
    --seed "$4" \
    --output "$samples" \
    "${@:5}"
  "$PYTHON" -u ssd-lm/report_genppl.py "$samples" --scorer "$SCORER"
  exit
fi

[[ "${1:---}" == --* ]] ||
  die "usage: $(basename "$0") [option of generate_text.py ...] or job LENGTH T SEED [option ...]"
for seed in ${SEEDS:-1 2 3 4 5 6 7 8 9 10 11 12}; do
  for length in ${LENGTHS:-1025 2050}; do
    for steps in ${STEPS:-1000 25}; do
      submit "$ROOT/ssd-lm/run_generate_text_batch.sh" job "$length" "$steps" "$seed" "$@"
    done
  done
done
