"""Commands that name a published model reach its weights, with the Hub replaced by a folder."""

import json

import huggingface_hub
import pytest
import safetensors.torch

from corpora.tokenization import load_tokenizer
from diffusion import Diffusion
from modes.starting_weights import load_model, new_model
from tests.docs.pages import commands, first_column
from tests.helpers.original_commands import commands as original_commands
from tests.helpers.original_commands import filled

OWNER = "kuleshov-group/"
SMALL = [
    "model.hidden_size=8", "model.cond_dim=4", "model.n_blocks=1", "model.n_heads=2",
    "model.attn_backend=sdpa", "trainer.accelerator=cpu", "trainer.devices=1",
]  # fmt: skip
SIZES = {
    "vocab_size": 50258, "model_length": 1024, "hidden_dim": 8, "cond_dim": 4, "n_blocks": 1,
    "n_heads": 2, "dropout": 0.1,
}  # fmt: skip


def described(repository: str, config) -> dict:
    """`config.json` of a published model."""
    name = repository.removeprefix(OWNER)
    sizes = SIZES | {"time_conditioning": config.algo.time_conditioning}
    if name.startswith(("mdlm", "sedd")):
        return sizes | {"model_type": "mdlm"}
    if name.startswith("ar"):
        return sizes | {"model_type": "bd3lm", "causal": True, "adaln": False}
    size = int(name.removesuffix("-pretrain").rpartition("block_size")[2])
    return sizes | {"model_type": "bd3lm", "block_size": size, "cross_attn": True}


def named_models(overrides: list[str]) -> list[str]:
    return [text for text in overrides if f"={OWNER}" in text]


FROM_PAGES = [overrides for overrides in commands() if named_models(overrides)]
OF_THE_ORIGINAL = {
    name: filled(command)
    for name, command in original_commands().items()
    if named_models(filled(command))
}
COMMANDS = [pytest.param(o, id=f"page {i}") for i, o in enumerate(FROM_PAGES)]
COMMANDS += [pytest.param(o, id=name) for name, o in OF_THE_ORIGINAL.items()]


@pytest.fixture(scope="module")
def tokenizer(shared):
    return load_tokenizer(str(shared / "data" / "tokenizers" / "gpt2"))


@pytest.mark.parametrize("overrides", COMMANDS)
def test_command_loads_the_model(overrides, compose, tokenizer, monkeypatch, tmp_path):
    """Through `hf_dit` or not: config.json and tensors alone are read, and all of them fit."""
    config = compose([*overrides, *SMALL])
    fresh = Diffusion(config, tokenizer)
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append(repository)
        content = json.dumps(described(repository, config))
        (tmp_path / "config.json").write_text(content)
        safetensors.torch.save_file(fresh.state_dict(), tmp_path / "model.safetensors")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = (
        new_model(config, tokenizer) if config.mode == "train" else load_model(config, tokenizer)
    )
    same = fresh.state_dict()["backbone.vocab_embed.embedding"]
    assert (found.backbone.vocab_embed.embedding == same).all()
    (named,) = named_models(overrides)
    assert asked == [named.partition("=")[2]]


def test_every_published_model_has_its_three_commands():
    names = first_column("docs/weights.md", "published as `kuleshov-group/...`")
    names = {name for name in names if "-owt" in name}
    assert names == {
        "bd3lm-owt-block_size4", "bd3lm-owt-block_size8", "bd3lm-owt-block_size16",
        "bd3lm-owt-block_size1024-pretrain", "mdlm-owt", "mdlm-noeos-owt", "sedd-noeos-owt",
        "ar-noeos-owt",
    }  # fmt: skip
    keys = ("eval.checkpoint_path", "training.from_pretrained")
    counts = dict.fromkeys(names, 0)
    for text in (text for overrides in FROM_PAGES for text in named_models(overrides)):
        key, _, model = text.partition("=")
        assert key in keys
        counts[model.removeprefix(OWNER)] += 1
    alike = ("bd3lm-owt-block_size8", "bd3lm-owt-block_size16")
    assert all(count >= 3 for name, count in counts.items() if name not in alike), counts


def test_the_originals_commands_are_among_them(shared):
    assert len(OF_THE_ORIGINAL) > 8
