"""Directories in Hub format that are right, half there, or lie."""

import json
import struct

import fsspec
import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import nn

from checkpointing.hub_directory import INDEX, looks_like_hub_id
from checkpointing.loading import load_weights
from checkpointing.weights import read_weights
from models.dit import DIT, DITConfig

CONFIG = {
    "model_type": "bd3lm", "block_size": 4, "model_length": 16, "vocab_size": 11, "hidden_dim": 8,
    "cond_dim": 4, "n_blocks": 1, "n_heads": 2, "cross_attn": True, "causal": False, "adaln": True,
    "time_conditioning": False,
}  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def network() -> nn.Module:
    module = nn.Module()
    module.backbone = DIT(
        DITConfig(vocab_size=11, block_size=4, hidden_size=8, cond_dim=4, n_blocks=1, n_heads=2)
    )
    return module


@pytest.fixture
def directory(tmp_path):
    """A directory of a small network's weights."""
    safetensors.torch.save_file(network().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def sharded(directory):
    """The same in two files and an index."""
    state = safetensors.torch.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: SHARDS[i % 2] for i, name in enumerate(state)}
    for shard in SHARDS:
        part = {name: state[name] for name in state if places[name] == shard}
        safetensors.torch.save_file(part, directory / shard)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return directory


def describe(directory, **changes) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("bd3lm-block_size4", 4), ("mdlm", None)])
def test_block_size_of_an_original(name, expected, shared):
    assert read_weights(str(shared / "golden" / "hub" / name)).block_size == expected


def test_shards_are_one_model(sharded):
    weights = read_weights(str(sharded))
    assert load_weights(network(), weights, use_ema=True).differing() == set()
    assert weights.hub_config["n_heads"] == 2


def test_an_older_export_may_name_another_algorithm(directory):
    """Switches say which algorithm it is where the file does not."""
    cases = [
        ({"cross_attn": False, "causal": True}, "ar"),
        ({}, "bd3lm"),
        ({"cross_attn": False}, "mdlm"),
        ({"cross_attn": False, "time_conditioning": True}, None),
        ({"cross_attn": False, "time_conditioning": True, "parameterization": "sedd"}, "sedd"),
        ({"cross_attn": False, "time_conditioning": True, "parameterization": "subs"}, "mdlm"),
        ({"cross_attn": False, "algo": "sedd"}, "sedd"),
    ]
    for changes, algo in cases:
        describe(directory, **changes)
        assert read_weights(str(directory)).hub_config["algo"] == algo, changes


# --- what is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_incomplete_directory(name, directory):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"a Hub-format directory needs {name}"):
        read_weights(str(directory))


def test_half_downloaded_shards(sharded):
    """An interrupted download: the index names what is not here."""
    (sharded / SHARDS[1]).rename(sharded / f"{SHARDS[1]}.incomplete")
    with pytest.raises(FileNotFoundError, match=f"1 of 2 files that {INDEX} names .*: {SHARDS[1]}"):
        read_weights(str(sharded))


def test_a_shard_that_is_cut_off(sharded):
    content = (sharded / SHARDS[0]).read_bytes()
    (sharded / SHARDS[0]).write_bytes(content[:-40])
    with pytest.raises(ValueError, match=f"{SHARDS[0]}: not a safetensors file"):
        read_weights(str(sharded))


def test_a_shard_of_another_model(sharded):
    """Two downloads into one directory."""
    safetensors.torch.save_file({"other": torch.ones(1)}, sharded / SHARDS[0])
    with pytest.raises(ValueError, match=f"lists tensors that {SHARDS[0]} does not hold: backbone"):
        read_weights(str(sharded))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "weights.bin", 3])
def test_an_index_that_points_elsewhere(shard, sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"backbone.a": shard}}))
    with pytest.raises(ValueError, match="is no name of a .safetensors file"):
        read_weights(str(sharded))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_places(index, sharded):
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{INDEX}: has no weight_map"):
        read_weights(str(sharded))


# --- what is not what it says --------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", None, ["bd3lm"]])
def test_unknown_model_type(model_type, directory):
    describe(directory, model_type=model_type)
    with pytest.raises(ValueError, match="config.json: model_type=.*, allowed are bd3lm and mdlm"):
        read_weights(str(directory))


@pytest.mark.parametrize("content", ["{cut", "[1, 2]", "", "\x00\x01", "[" * 100_000])
def test_config_that_is_no_json_object(content, directory):
    (directory / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: not a JSON (file|object)"):
        read_weights(str(directory))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("n_blocks", "twelve", "a positive integer"),
        ("vocab_size", 0, "a positive integer"),
        ("n_heads", True, "a positive integer"),
        ("causal", "no", "true or false"),
        ("time_conditioning", 1, "true or false"),
    ],
)
def test_sizes_that_are_none(key, value, allowed, directory):
    describe(directory, **{key: value})
    with pytest.raises(ValueError, match=f"config.json: {key}={value!r}, allowed is {allowed}"):
        read_weights(str(directory))


@pytest.mark.parametrize("algo", ["gpt", ["ar"], 3])
def test_unknown_algorithm(algo, directory):
    describe(directory, algo=algo)
    with pytest.raises(ValueError, match="config.json: algo=.*, allowed are ar, bd3lm, mdlm, sedd"):
        read_weights(str(directory))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_dim", "n_blocks", "n_heads", "cond_dim"])
def test_a_config_of_another_model(key, directory):
    """Files of two models in one directory."""
    describe(directory, **{key: CONFIG[key] * 2})
    message = f"configuration says {key}={CONFIG[key] * 2}, its tensors have {CONFIG[key]}"
    with pytest.raises(ValueError, match=message):
        read_weights(str(directory))


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


LYING = {
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "more data than there is": header(a=tensor([1000], 0, 4000)) + bytes(40),
    "a shape that is not the data's": header(a=tensor([1000], 0, 40)) + bytes(40),
    "an overflowing shape": header(a=tensor([2**33, 2**33], 0, 40)) + bytes(40),
    "tensors in one place": header(a=tensor([10], 0, 40), b=tensor([10], 0, 40)) + bytes(40),
    "an offset before the data": header(a=tensor([10], -40, 0)) + bytes(40),
    "data that no tensor has": header(a=tensor([10], 0, 40)) + bytes(400),
    "no JSON": struct.pack("<Q", 8) + b"{'a': 1}",
    "a page": b"<!DOCTYPE html><title>404</title>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n",
    "nothing": b"",
}


@pytest.mark.parametrize("name", LYING)
@pytest.mark.parametrize("place", ["directory", "file", "elsewhere"])
def test_lying_headers(name, place, directory):
    path = directory / "model.safetensors"
    path.write_bytes(LYING[name])
    elsewhere = "memory://model.safetensors"
    with fsspec.open(elsewhere, "wb") as file:
        file.write(LYING[name])
    source = {"directory": str(directory), "file": str(path), "elsewhere": elsewhere}[place]
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file"):
        read_weights(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(value, directory):
    """A diverged training; the message says which weights."""
    state = network().state_dict()
    name = "backbone.blocks.0.attn_out.weight"
    state[name][3, 2] = value
    safetensors.torch.save_file(state, directory / "model.safetensors")
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{directory}: {name} holds NaN or infinite values"):
        load_weights(model, read_weights(str(directory)), use_ema=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_weights_of_integers(directory):
    """Quantised elsewhere: copied as they are, they would be silently other weights."""
    state = network().state_dict()
    name = "backbone.blocks.0.attn_out.weight"
    state[name] = state[name].to(torch.int8)
    safetensors.torch.save_file(state, directory / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is of torch.int8, allowed are floating types"):
        load_weights(network(), read_weights(str(directory)), use_ema=True)


# --- the Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("kuleshov-group/mdlm-owt", True),
        ("kuleshov-group/mdlm-owt@main", True),
        ("kuleshov-group/mdlm-owt@refs/pr/1", True),
        ("./runs/last.ckpt", False),
        ("/runs/last.ckpt", False),
        ("~/last.ckpt", False),
        ("last.ckpt", False),
        ("runs/bd3lm/last.ckpt", False),
    ],
)
def test_what_may_be_a_hub_id(source, expected):
    assert looks_like_hub_id(source) == expected


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("no connection"),
        huggingface_hub.errors.HFValidationError("no such name"),
        OSError("Network is unreachable"),
    ],
)
def test_unreachable_hub(error, monkeypatch):
    """Without a network the message says which files to put where."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError) as raised:
        read_weights("kuleshov-group/bd3lm-owt-block_size4@v2")
    message = str(raised.value)
    assert message.startswith("kuleshov-group/bd3lm-owt-block_size4@v2: no such file here")
    assert "config.json and model.safetensors into a directory and give that directory" in message
    assert message.endswith("huggingface.co/kuleshov-group/bd3lm-owt-block_size4/tree/v2")


def test_a_download_takes_no_code(monkeypatch, directory):
    """The repositories hold modeling code of their own; it is neither fetched nor run."""
    asked = {}

    def download(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, files=tuple(allow_patterns))
        (directory / "modeling.py").write_text("raise SystemExit('it ran')")
        describe(directory, auto_map={"AutoModelForMaskedLM": "modeling.Model"})
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    read_weights("kuleshov-group/mdlm-owt@abc")
    assert asked == {
        "repository": "kuleshov-group/mdlm-owt",
        "revision": "abc",
        "files": ("config.json", "model.safetensors.index.json", "tokenizer_record.json",
                  "*.safetensors"),
    }
