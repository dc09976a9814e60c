"""What the README says: its commands, tables, files and picture are those of the code."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from matplotlib.colors import to_rgb

import configuration
from models.masks import AttentionPattern, may_attend
from noise_schedule import SCHEDULES
from scripts.draw_attention_mask import BLOCK_SIZE, LENGTH, PARTS, PICTURE, draw
from tests.helpers.places import PROJECT

README = (PROJECT / "README.md").read_text()
CODE = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]
FOLDERS = (
    ".", "configuration", "corpora", "models", "models/hf", "sampling", "scripts", "training",
)  # fmt: skip
# The panels of the picture, in the order of its axes: pattern, block size, length of a half.
PANELS = (
    (AttentionPattern.BLOCK_DIFFUSION, BLOCK_SIZE, 2 * LENGTH),
    (AttentionPattern.BLOCK_CAUSAL, BLOCK_SIZE, LENGTH),
    (AttentionPattern.BLOCK_DIFFUSION, 1, 2 * LENGTH),
    (AttentionPattern.BLOCK_DIFFUSION, LENGTH, 2 * LENGTH),
)


def section(title: str) -> str:
    """Returns the text from a heading to the next one."""
    return re.split(rf"^#+ {re.escape(title)}\n", README, flags=re.MULTILINE)[1].split("\n#")[0]


def first_column(heading: str) -> list[str]:
    """Returns the names in backticks in the first column of the table with this heading."""
    table = README.split(f"\n| {heading} |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [name for cell in rows for name in re.findall(r"`([^`]+)`", cell)]


def commands() -> list[list[str]]:
    """Returns the overrides of every `python main.py` command, in blocks and in lines."""
    lines = "\n".join(CODE).replace("\\\n", " ").splitlines() + INLINE
    words = [shlex.split(line.replace("$PWD", "/runs")) for line in lines]
    found = [line[2:] for line in words if line[:2] == ["python", "main.py"]]
    return [overrides for overrides in found if not overrides[0].startswith("--")]


def expanded(text: str) -> list[str]:
    """Expands the braces of a file name as the shell does."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(pick) for pick in itertools.product(*choices)]


def script_commands() -> list[tuple[list[str], list[str]]]:
    """Returns (files, overrides) of every shell script that is named."""
    found = []
    for code in INLINE:
        words = [word for word in code.split() if not re.match(r"[A-Z_]+=", word)]
        if words and re.fullmatch(r"scripts/.*\.sh", words[0]):
            found.append((expanded(words[0]), words[1:]))
    return found


@pytest.mark.parametrize("overrides", commands(), ids=" ".join)
@pytest.mark.parametrize("gpus", [1, 4])
def test_command_is_valid(compose, fake_gpus, gpus, overrides):
    """Every command composes and passes validation, and sets no key that does nothing."""
    fake_gpus(gpus)
    config = compose(overrides)
    configuration.validate(config)
    assert configuration.ignored_key_warnings(config) == []


def test_commands_cover_every_mode_and_algo(compose):
    """The parser above finds commands, for each mode and algorithm at least one."""
    configs = [compose(overrides) for overrides in commands()]
    assert {config["mode"] for config in configs} == {"train", "ppl_eval", "sample_eval"}
    assert {config["algo"]["name"] for config in configs} == {"ar", "bd3lm", "mdlm", "sedd"}


def test_scripts_exist_and_all_are_named(compose):
    """The paper's table names every script, and what it appends composes."""
    found = script_commands()
    named = {file for files, _ in found for file in files}
    assert named == {str(path.relative_to(PROJECT)) for path in PROJECT.glob("scripts/**/*.sh")}
    for _, overrides in found:
        compose(overrides)


def test_modules_and_targets_exist():
    """`python -m ...` and `make ...` name something that is there."""
    everything = "\n".join([*CODE, *INLINE])
    for module in re.findall(r"python -m ([\w.]+)", everything):
        path = PROJECT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    makefile = (PROJECT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z-]+)", everything, flags=re.MULTILINE)
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("group", ["algo", "model", "data", "noise"])
def test_groups_are_complete(group):
    """A table lists every file of its config group."""
    files = {path.stem for path in PROJECT.glob(f"configs/{group}/*.yaml")} - {"_base"}
    assert set(first_column(f"`{group}`")) == files
    if group == "noise":
        assert files == set(SCHEDULES)


def test_algo_and_model_tables():
    """Parameterization, sampler and sizes are those of the YAML files."""
    for name in ("ar", "bd3lm", "mdlm", "sedd"):
        algo = yaml.safe_load((PROJECT / f"configs/algo/{name}.yaml").read_text())
        row = re.search(rf"^\| `{name}`.*", README, flags=re.MULTILINE)[0].split("|")
        assert row[2].strip().startswith(f"`{algo['parameterization']}`")
        assert row[5].strip().startswith(f"`{algo['sampler']}`")
    for name in ("tiny", "small", "medium"):
        model = yaml.safe_load((PROJECT / f"configs/model/{name}.yaml").read_text())
        row = re.search(rf"^\| `{name}`.*", README, flags=re.MULTILINE)[0].split("|")
        keys = ("hidden_size", "cond_dim", "n_blocks", "n_heads")
        assert [int(cell) for cell in row[2:6]] == [model[key] for key in keys]


def test_data_table(compose):
    """Tokenizers are those of the YAML files."""
    for row in README.split("\n| `data` |")[1].split("\n\n")[0].splitlines()[2:]:
        cells = row.split("|")
        for name in re.findall(r"`([^`]+)`", cells[1]):
            data = compose([f"data={name}"])["data"]
            assert cells[5].strip() == f"`{data['tokenizer_name_or_path']}`"


def test_ignored_keys_are_listed():
    """Keys that do nothing are those that `configuration/` warns of."""
    text = section("Keys that are accepted and do nothing").split("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", text)) == set(configuration.IGNORED_KEYS)


def test_layout_names_what_is_there():
    """Every file of the layout table exists, and every module and config folder is in it."""
    named = set(first_column("file"))
    for name in named:
        assert (PROJECT / name).exists(), name
    modules = {
        str(path.relative_to(PROJECT))
        for folder in FOLDERS
        for path in (PROJECT / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    folders = {f"configs/{path.name}/" for path in (PROJECT / "configs").iterdir() if path.is_dir()}
    assert modules | folders <= named


def test_layout_covers_the_root():
    """Every tracked file or folder of the root is in the layout table."""
    if not (PROJECT / ".git").exists():
        pytest.skip("needs a git checkout")
    listing = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    roots = {path.split("/")[0] for path in listing.stdout.splitlines()}
    assert roots <= {name.split("/")[0] for name in first_column("file")}


def test_links_exist():
    """A relative link leads somewhere."""
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (PROJECT / target).is_file(), target


def test_line_length():
    """Lines other than rows of tables have at most 100 columns."""
    assert [line for line in README.splitlines() if len(line) > 100 and line[0] != "|"] == []


@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "drawn"])
def test_picture_agrees_with_the_mask(is_committed, tmp_path):
    """Each cell has the colour of its part where `may_attend` allows it, and grey elsewhere."""
    path = PICTURE if is_committed else tmp_path / "mask.png"
    figure = draw()
    figure.savefig(tmp_path / "mask.png")  # also settles where the axes are
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(path)[..., :3]
    width, height = figure.get_size_inches() * figure.dpi
    assert pixels.shape[:2] == (round(height), round(width))
    colors = np.array([to_rgb(color) for _, color in PARTS])
    for axes, (pattern, block_size, size) in zip(figure.axes, PANELS, strict=True):
        index = torch.arange(size)
        seen = may_attend(
            index[:, None], index[None, :],
            pattern=pattern, length=LENGTH, block_size=block_size,
        )  # fmt: skip
        for query, key in itertools.product(range(size), repeat=2):
            x, y = axes.transData.transform((key, query))
            color = pixels[round(height - y), round(x)]
            part = int(np.abs(colors - color).sum(axis=1).argmin())
            assert np.allclose(colors[part], color, atol=0.01)
            is_noisy = (query < LENGTH, key < LENGTH)
            in_training = {(True, True): 1, (True, False): 2, (False, False): 3}.get(is_noisy, 0)
            allowed = 3 if pattern is AttentionPattern.BLOCK_CAUSAL else in_training
            assert part == (allowed if seen[query, key] else 0), (query, key)
