# shellcheck shell=bash
# Sourced by every script below this folder: where things are, what must exist, how a run starts.
#
# Variables a user may set:
#   PYTHON          the interpreter (default: the project's .venv, else python)
#   CHECKPOINT      the weights to evaluate, where a script evaluates some
#   CHECKPOINT_DIR  where the scripts look for checkpoints under their default names
#   BD3LM_CACHE     the folder of the tokenised data sets
#   BD3LM_ROOT      the project's root, where sbatch was called from somewhere else
set -euo pipefail

INVOKED_FROM="$PWD"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

CHECKPOINT_DIR="${CHECKPOINT_DIR:-$ROOT}"
export BD3LM_CACHE="${BD3LM_CACHE:-$HOME/.cache/bd3lm}"
ZERO_SHOT_DATASETS="ptb wikitext103 lm1b-gpt2 lambada ag_news"
ZERO_SHOT_DATASETS+=" scientific_papers_pubmed scientific_papers_arxiv"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python
  if [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi

# die MESSAGE: says what is wrong and stops.
die() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

# find_checkpoint VARIABLE DEFAULT: prints the checkpoint that the variable names, or the default:
# a path as an absolute one, a URL or a Hub id as it is.
find_checkpoint() {
  local variable="$1"
  local value="${!variable:-$2}"
  if [[ "$value" != /* && -e "$INVOKED_FROM/$value" ]]; then
    value="$INVOKED_FROM/$value"
  fi
  if [[ ! -e "$value" && "$value" != *://* ]]; then
    [[ "$value" =~ ^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@.+)?$ && "$value" != *.ckpt ]] ||
      die "no checkpoint at $value; set $variable to the path of one"
  fi
  echo "$value"
}

LAUNCHES=0

# launch OVERRIDE...: one run of main.py, through srun inside a Slurm job.
launch() {
  LAUNCHES=$((LAUNCHES + 1))
  [[ "$BD3LM_CACHE" == *://* ]] || mkdir -p "$BD3LM_CACHE" ||
    die "cannot write the data cache $BD3LM_CACHE; set BD3LM_CACHE to a writable folder"
  if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    "$PYTHON" -u main.py "$@"
    return
  fi
  # srun takes the CPUs per task from its own variable only.
  if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
  fi
  # A requeued job keeps its number: it finds its run directory again, and its checkpoints there.
  # All tasks agree on it, too, which they may not on a name made of the time.
  set -- "hydra.run.dir=./outputs/\${data.train}/slurm-$SLURM_JOB_ID-$LAUNCHES" "$@"
  if ((${SLURM_NNODES:-1} > 1)); then set -- "trainer.num_nodes=$SLURM_NNODES" "$@"; fi
  srun --kill-on-bad-exit=1 "$PYTHON" -u main.py "$@"
}

# submit SCRIPT ARGUMENT...: hands a script to Slurm, or runs it here where there is no Slurm.
submit() {
  if command -v sbatch >/dev/null; then
    sbatch "$@"
  else
    bash "$@"
  fi
}
