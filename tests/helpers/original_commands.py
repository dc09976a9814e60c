"""The commands that the original ships, as data."""

import json
from string import Template

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
