"""docs/add_an_algorithm.md: the example is whole, short, and does what the page says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import EXAMPLE, commands_of, page
from tests.helpers.places import PROJECT
from tests.helpers.small_run import overrides, write_text

NEW_FILE = re.compile(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def new_files() -> dict[str, str]:
    """Path and text of each file that the page shows."""
    return dict(NEW_FILE.findall(page(EXAMPLE).text))


def changes() -> str:
    """The lines to change in files that are there."""
    (diff,) = [code for language, code in page(EXAMPLE).blocks if language == "diff"]
    return diff


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project with the example in it."""
    root = tmp_path_factory.mktemp("copy") / "project"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "outputs", "runs", "*.ckpt")
    shutil.copytree(PROJECT, root, ignore=ignored)
    for name, text in new_files().items():
        assert not (root / name).exists(), f"{name} is no new file"
        (root / name).write_text(text)
    subprocess.run(["git", "apply", "-"], cwd=root, input=changes(), text=True, check=True)
    return root


def run(root: Path, *arguments: str) -> str:
    """What a Python command prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_short():
    """A config, a sampler, a loss and a test in fewer than 60 lines."""
    added = re.findall(r"^\+(?!\+\+ )", changes(), flags=re.MULTILINE)
    lines = [line for text in new_files().values() for line in text.splitlines()]
    assert {Path(name).suffix for name in new_files()} == {".yaml", ".py"}
    assert 30 < len(added) + len(lines) < 60


def test_its_test_passes(copy):
    """And the layers stay as they are."""
    (test,) = [name for name in new_files() if name.startswith("tests/")]
    assert " passed" in run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", test,
                            "tests/test_layers.py")  # fmt: skip


def test_the_command_runs(copy, tmp_path):
    """Trained, evaluated and sampled in as many passes as the page's command asks for."""
    (command,) = commands_of(page(EXAMPLE))
    kept = [o for o in command if o.split("=")[0] in ("algo", "then", "algo.T")]
    assert len(kept) == 3
    write_text(tmp_path)
    small = overrides(tmp_path, f"hydra.run.dir={tmp_path}/run", "loader.eval_global_batch_size=2",
                      f"checkpointing.save_dir={tmp_path}",
                      f"eval.checkpoint_path={tmp_path}/checkpoints/last.ckpt")  # fmt: skip
    said = run(copy, "main.py", *small, *kept)
    assert re.search(r"mean gen_nfes +│ 8\.0000", said), said
