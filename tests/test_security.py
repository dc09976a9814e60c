"""SECURITY.md's rules, read off the syntax tree of every source file of the program."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from configuration import resolvers
from tests.helpers.places import PROJECT

SOURCES = sorted(
    path
    for path in PROJECT.rglob("*.py")
    if not {"tests", ".venv", "outputs"} & set(path.relative_to(PROJECT).parts)
)
SCRIPTS = [*PROJECT.rglob("scripts/**/*.sh"), *PROJECT.glob("ssd-lm/*.sh"), PROJECT / ".ci/run"]

# Calls that run code out of text or files, by their written name.
FORBIDDEN = re.compile(
    r"eval|exec|compile|__import__|os\.(system|popen|spawn\w*|exec\w*)|"
    r"(\w+\.)*(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\.\w+|(\w+\.)*Unpickler|"
    r"yaml\.(load|unsafe_load|full_load)|tempfile\.mktemp|subprocess\.(getoutput|getstatusoutput)|"
    r"importlib\.import_module|(\w+\.)*torch\.hub\.\w+"
)
# Hydra calls what `_target_` names. Only the sections of the user's own configuration get there.
INSTANTIATED = {
    "config.lr_scheduler",  # of benchmarks
    "section",  # of `training.instantiation.instantiated`, which is given one of these:
    "arguments",  # the section `trainer`
    "strategy",  # the section, in the words of this torch
    "_written_once(callback)",  # an entry of the section `callbacks`
}
TARGETS = ("lightning.", "torch.", "training.", "transformers.")


def identity(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file with the written name of what is called."""
    tree = ast.parse(path.read_text(), filename=str(path))
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    """The constant that an argument is given, None where it is not given or no constant."""
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_nothing_runs_text_or_pickles(path):
    """The original called `eval` on its configuration and on the cells of CSV files."""
    for name, call in calls(path):
        assert not FORBIDDEN.fullmatch(name), f"{name} in line {call.lineno}"
        assert keyword(call, "allow_pickle") is not True, f"allow_pickle in line {call.lineno}"
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, f"torch.load in line {call.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_code_of_others_is_never_fetched(path):
    """`trust_remote_code` runs what a repository of the Hub holds."""
    for name, call in calls(path):
        given = [k for k in call.keywords if k.arg == "trust_remote_code"]
        assert all(keyword(call, k.arg) is False for k in given), f"{name} in line {call.lineno}"
        if name.startswith("Auto") and name.endswith(".from_pretrained"):
            assert given, f"{name} in line {call.lineno} leaves it to the default"


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_no_shell_sees_a_value(path):
    """Programs are started from lists of arguments."""
    for name, call in calls(path):
        assert keyword(call, "shell") in (None, False), f"shell in line {call.lineno}"
        if re.fullmatch(r"subprocess\.\w+", name):
            is_text = isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
            assert not is_text, f"{name} in line {call.lineno}"


def test_only_the_users_configuration_names_what_is_called(compose):
    """The configuration inside a checkpoint is compared and shown, never instantiated."""
    found = {
        ast.unparse(call.args[0])
        for path in SOURCES
        for name, call in calls(path)
        if name.rpartition(".")[2]
        in ("instantiate", "instantiated", "get_method", "get_class", "get_object")
    }
    assert found and found <= INSTANTIATED
    for path in PROJECT.rglob("configs/**/*.yaml"):
        for target in re.findall(r"_target_: *(\S+)", path.read_text()):
            assert target.startswith(TARGETS), f"{target} in {identity(path)}"


def test_the_rules_see_what_they_are_made_for(tmp_path):
    """The tests above fail on the defects that they name."""
    source = tmp_path / "bad.py"
    for bad, check in (
        ("eval(cell)", test_nothing_runs_text_or_pickles),
        ("pickle.load(file)", test_nothing_runs_text_or_pickles),
        ("torch.load(path)", test_nothing_runs_text_or_pickles),
        ("numpy.load(path, allow_pickle=True)", test_nothing_runs_text_or_pickles),
        ("AutoModel.from_pretrained(name)", test_code_of_others_is_never_fetched),
        ("f(name, trust_remote_code=True)", test_code_of_others_is_never_fetched),
        ("subprocess.run(command, shell=True)", test_no_shell_sees_a_value),
        ("subprocess.run(f'rm {path}')", test_no_shell_sees_a_value),
    ):
        source.write_text(bad)
        with pytest.raises(AssertionError):
            check(source)


def test_resolvers_compute_and_read_nothing(compose):
    """`${eval:...}` of the original took any Python; what is left is arithmetic and counting."""
    from omegaconf import OmegaConf

    resolvers.register_resolvers()
    assert not OmegaConf.has_resolver("eval")
    config = OmegaConf.create({"x": "${eval:'__import__(\"os\").getcwd()'}"})
    with pytest.raises(Exception, match="eval"):
        OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=identity)
def test_scripts_evaluate_nothing(path):
    """Quoting is shellcheck's to see (test_scripts.py); these would interpret a value again."""
    for line in path.read_text().splitlines():
        code = line.partition("#")[0]
        assert not re.search(r"\beval\b(?![._])|\b(ba)?sh -c\b", code), line


def test_an_override_is_no_command(tmp_path):
    """A value with shell syntax reaches main.py as it is, through a script and through a job."""
    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    (tmp_path / "last.ckpt").touch()
    value = f"seed=$(touch {tmp_path}/ran); touch {tmp_path}/ran; `touch {tmp_path}/ran` * 'a b'"
    done = subprocess.run(
        ["bash", PROJECT / "scripts/ppl/ppl_owt_ar.sh", value], capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": str(stub),
             "CHECKPOINT": str(tmp_path / "last.ckpt")},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == value, done.stderr
    assert not (tmp_path / "ran").exists()


def test_what_is_trusted_is_written_down():
    """The page names every source of files that the program reads."""
    page = (PROJECT / "SECURITY.md").read_text()
    for subject in ("configuration", "checkpoint", "Hub", "data", "tokenizer", "wandb", "Slurm"):
        assert subject in page
