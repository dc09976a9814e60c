"""Every command the original ships composes and passes validation."""

import json
from string import Template

import pytest

import configuration
from tests.helpers.places import SHARED

COMMANDS = SHARED / "reference/commands.json"
ZERO_SHOT = (
    "ptb",
    "wikitext103",
    "wikitext2",
    "lm1b-gpt2",
    "lambada",
    "ag_news",
    "scientific_papers_pubmed",
    "scientific_papers_arxiv",
)
POSITIONAL = {"LENGTH": "2048", "SEED": "7", "BLOCK_SIZE": "16"}

# The original adds this key although the YAML file has it, which Hydra refuses.
CORRECTED = {"+data.insert_valid_eos=False": "data.insert_valid_eos=False"}


def filled(command: dict, *, data: str = "ptb", pwd: str = "/runs") -> list[str]:
    """Returns a command's overrides with its placeholders filled."""
    values = {
        name: POSITIONAL[name] if value.startswith("$") else value
        for name, value in command["vars"].items()
    }
    return [Template(text).substitute(values, data=data, PWD=pwd) for text in command["overrides"]]


def commands() -> dict[str, dict]:
    """Reads the commands, with the one defect of train_owt_ar.sh mended."""
    if not COMMANDS.is_file():
        return {}
    table = json.loads(COMMANDS.read_text())
    train_ar = table["scripts/train/train_owt_ar.sh"]
    train_ar["overrides"] = [CORRECTED.get(text, text) for text in train_ar["overrides"]]
    return table


def cases() -> list[tuple[str, list[str]]]:
    """Returns one case per command, and one per data set where a command loops over them."""
    found = []
    for name, command in commands().items():
        sets = ZERO_SHOT if "data=$data" in command["overrides"] else ("",)
        for data in sets:
            found.append((f"{name} {data}".strip(), filled(command, data=data)))
    return found


CASES = cases()


def test_number_of_commands(shared):
    """All 31 commands are tested."""
    assert len(commands()) == 31


@pytest.mark.skipif(not CASES, reason="needs ../shared/reference/commands.json")
@pytest.mark.parametrize("overrides", [case[1] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("gpus", [1, 4])
def test_command_is_valid(compose, fake_gpus, gpus, overrides):
    """A step fits one GPU with accumulation and four, the most that rows of 128 allow."""
    fake_gpus(gpus)
    config = compose(overrides)
    configuration.validate(config)
    assert configuration.ignored_key_warnings(config) == []


@pytest.mark.skipif(not CASES, reason="needs ../shared/reference/commands.json")
def test_evaluation_commands_are_valid_without_gpu(compose, fake_gpus):
    """Only training with FlexAttention needs a GPU."""
    fake_gpus(0)
    for _, overrides in CASES:
        config = compose(overrides)
        if config["mode"] == "train" and config["model"]["attn_backend"] == "flex":
            with pytest.raises(ValueError, match="model.attn_backend=flex"):
                configuration.validate(config)
        else:
            configuration.validate(config)
