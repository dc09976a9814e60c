"""SSD-LM's files: what is read, what is refused and how, and that nothing in them is run."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from ssd_model import EMBED_SUM, TIMESTEP, find_folder, load_model, load_tokenizer

from tests.ssd_lm.conftest import HIDDEN, VOCAB_SIZE


def test_largest_block(tiny):
    """RoBERTa's positions hold two blocks of `max_block_size`, and no more."""
    model = load_model(str(tiny))
    largest = model.max_block_size
    assert largest == 31

    def run(size):
        return model(torch.zeros(1, size, VOCAB_SIZE), torch.full((1, size), 3), 1.0)

    assert run(largest).shape == (1, largest, VOCAB_SIZE)
    with pytest.raises((IndexError, RuntimeError)):
        run(largest + 1)


def test_weights_as_a_bin_file(copy):
    """The published weights are older than safetensors."""
    expected = load_model(str(copy)).state_dict()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    found = load_model(str(copy)).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Exploit:
    """Unpickled by an unsafe reader, this makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [EMBED_SUM, TIMESTEP, "pytorch_model.bin"])
def test_hostile_files_execute_nothing(copy, tmp_path, name):
    """A pickle that runs code when it is read is refused, by its name, and runs nothing."""
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    torch.save({"weight": Exploit(tmp_path / "executed")}, copy / name)
    with pytest.raises(ValueError, match=str(copy)) as error:
        load_model(str(copy))
    assert name in str(error.value) or name == "pytorch_model.bin"
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", EMBED_SUM, TIMESTEP])
@pytest.mark.parametrize("size", [0, 100])
def test_truncated_files(copy, name, size):
    """A download that broke off is named."""
    with open(copy / name, "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=str(copy)):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", EMBED_SUM, TIMESTEP])
def test_missing_files(copy, name):
    """A missing file is named, and what a directory needs."""
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}.*needed are config.json"):
        load_model(str(copy))


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(HIDDEN, VOCAB_SIZE - 1)},
        {"weight": torch.zeros(HIDDEN, VOCAB_SIZE), "bias": torch.zeros(HIDDEN)},
        {"weight": "text"},
        [torch.zeros(HIDDEN, VOCAB_SIZE)],
        {},
    ],
    ids=["shape", "bias", "text", "list", "empty"],
)
def test_layers_that_do_not_fit(copy, content):
    """The error gives what the file holds and what is needed."""
    torch.save(content, copy / EMBED_SUM)
    with pytest.raises(ValueError, match=rf"{EMBED_SUM}: holds .* needed .*\(16, 260\)"):
        load_model(str(copy))


def test_weights_that_lack_some(copy):
    """transformers would fill them with random numbers, and only log it."""
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the weights lack lm_head.dense.weight"):
        load_model(str(copy))


def test_hub_id(tiny, monkeypatch):
    """Only weights and config are fetched, at the revision that was asked for."""
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_folder("someone/model@abc") == tiny
    assert asked[0][:2] == ("someone/model", "abc")
    assert not [pattern for pattern in asked[0][2] if pattern.endswith(".py") or "*" in pattern]


def test_unreachable_hub(monkeypatch):
    """The error says which files to put where."""

    def download(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError) as error:
        load_model("xhan77/ssdlm")
    for part in ("--model xhan77/ssdlm", EMBED_SUM, TIMESTEP, "tree/main", "no route"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="--model ./nowhere: no such directory"):
        load_model("./nowhere")


def test_tokenizer_must_be_the_models(tiny, scorer):
    """Ids of another vocabulary would give nonsense."""
    tokenizer = load_tokenizer(None, model=str(tiny), vocab_size=VOCAB_SIZE)
    assert len(tokenizer) == VOCAB_SIZE
    with pytest.raises(ValueError, match=f"--tokenizer {scorer}: has 260 .*model's 50265 tokens"):
        load_tokenizer(str(scorer), model=str(tiny), vocab_size=50_265)
    with pytest.raises(FileNotFoundError, match="--tokenizer ./nowhere: could not be loaded"):
        load_tokenizer("./nowhere", model=str(tiny), vocab_size=VOCAB_SIZE)
