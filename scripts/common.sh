# shellcheck shell=bash
# Sourced by every script below this folder, and by those of ssd-lm/ and benchmarks/: what a script
# takes, where things are, what must exist, how a run starts.
#
# Variables a user may set:
#   PYTHON          the interpreter (default: the project's .venv, else python)
#   CHECKPOINT      the weights to evaluate, where a script evaluates some
#   CHECKPOINT_DIR  where the scripts look for checkpoints under their default names
#   BD3LM_CACHE     the folder of the tokenised data sets
#   BD3LM_ROOT      the project's root, where sbatch was called from somewhere else
set -euo pipefail

# die MESSAGE: says what is wrong and stops.
die() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

# usage_of SCRIPT: prints the script's line "# usage: NAME ARGUMENT... [override ...]".
usage_of() {
  local line
  while read -r line; do
    if [[ "$line" == "# usage: "* ]]; then
      echo "${line#\# usage: }"
      return
    fi
  done <"$1"
}

# The arguments in the script's usage line become variables: LENGTH is the argument LENGTH, and a
# choice like ar|mdlm is ALGO. This file shares "$@" with the script, where only overrides stay.
USAGE="$(usage_of "$0")"
read -ra WORDS <<<"$USAGE"
for name in "${WORDS[@]:1}"; do
  if [[ "$name" == *"|"* ]]; then
    [[ "${1:-}" =~ ^($name)$ ]] || die "usage: $USAGE"
    name=ALGO
  fi
  [[ "$name" =~ ^[A-Z_]+$ ]] || break
  (($#)) || die "usage: $USAGE"
  printf -v "$name" %s "$1"
  shift
done

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

# find_checkpoint VARIABLE DEFAULT: makes the variable, or the default where it is not set, a
# checkpoint that exists: a path becomes an absolute one, a URL or a Hub id stays as it is. The
# default is a file of CHECKPOINT_DIR, NAME.ckpt, or a Hub id.
find_checkpoint() {
  local variable="$1" default="$2" value
  if [[ "$default" == *.ckpt ]]; then default="$CHECKPOINT_DIR/$default"; fi
  value="${!variable:-$default}"
  if [[ "$value" != /* && -e "$INVOKED_FROM/$value" ]]; then
    value="$INVOKED_FROM/$value"
  fi
  if [[ ! -e "$value" && "$value" != *://* ]]; then
    [[ "$value" =~ ^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@.+)?$ && "$value" != *.ckpt ]] ||
      die "no checkpoint at $value; set $variable to the path of one"
  fi
  printf -v "$variable" %s "$value"
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

# submit_each SCRIPT OVERRIDE...: a job per seed, length and block size of SEEDS, LENGTHS and
# BLOCK_SIZES. A script whose usage line has no length or no block size gets none.
submit_each() {
  local script="$ROOT/scripts/$1" usage this_seed this_length this_size
  local every_length=("") every_size=("")
  shift
  usage="$(usage_of "$script")"
  if [[ "$usage" == *" LENGTH "* ]]; then read -ra every_length <<<"$LENGTHS"; fi
  if [[ "$usage" == *" BLOCK_SIZE "* ]]; then read -ra every_size <<<"$BLOCK_SIZES"; fi
  for this_seed in $SEEDS; do
    for this_length in "${every_length[@]}"; do
      for this_size in "${every_size[@]}"; do
        submit "$script" ${this_length:+"$this_length"} "$this_seed" ${this_size:+"$this_size"} "$@"
      done
    done
  done
}
