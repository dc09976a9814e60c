"""Weights through all formats and back, bit for bit; what is at the destination is safe."""

import json

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf

from checkpointing import hub_directory
from checkpointing.convert import main
from checkpointing.hub_directory import write_hub_directory
from checkpointing.weights import read_checkpoint, read_weights
from corpora.tokenization import load_tokenizer
from models.ema import ExponentialMovingAverage
from modes.starting_weights import load_model
from tests.helpers.small_module import module
from tests.helpers.small_run import ALGOS, overrides

SMALL = ["data.tokenizer_name_or_path=text8", "model.length=16"]


def save_ours(model, path, *, ema: bool = True) -> None:
    """A checkpoint such as training writes, with an average unlike the weights."""
    average = ExponentialMovingAverage(model.parameters(), decay=0.9)
    average.shadow = [shadow + 1 for shadow in average.shadow]
    average.num_updates = 7
    checkpoint = {"state_dict": model.state_dict(), "epoch": 1, "global_step": 5}
    model.on_save_checkpoint(checkpoint)
    if ema:
        checkpoint["ema"] = average.state_dict()
    torch.save(checkpoint, path)


def assert_same(found: dict, expected: dict) -> None:
    """Bit for bit, in the same order."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("algo", ALGOS)
def test_round_trip(algo, compose, tmp_path, capsys):
    """ours -> Hub -> ours -> Lightning in the original's layout: no bit changes."""
    model = module(compose, tmp_path, *ALGOS[algo])
    save_ours(model, tmp_path / "ours.ckpt")
    averages = [tensor.detach() + 1 for tensor in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    averaged = model.state_dict() | dict(zip(names, averages, strict=True))

    assert main([str(tmp_path / "ours.ckpt"), str(tmp_path / "hub")]) == 0
    assert "(moving average): " in capsys.readouterr().out
    hub = read_weights(str(tmp_path / "hub"))
    assert_same({name: hub.state_dict[name] for name in averaged}, averaged)

    config = compose(overrides(tmp_path, *SMALL, *ALGOS[algo],
                               f"eval.checkpoint_path={tmp_path}/hub"))  # fmt: skip
    ours = load_model(config, load_tokenizer("text8"))
    assert_same(dict(ours.state_dict()), averaged)
    save_ours(ours, tmp_path / "again.ckpt")

    assert main([str(tmp_path / "again.ckpt"), str(tmp_path / "original.ckpt")]) == 0
    original = torch.load(tmp_path / "original.ckpt", weights_only=True)
    assert_same(original["state_dict"], averaged)
    twice = [tensor + 1 for tensor in averages]
    assert all(map(torch.equal, original["ema"]["shadow_params"], twice))
    assert (original["ema"]["decay"], original["ema"]["num_updates"]) == (0.9, 7)


@pytest.mark.parametrize("name", ["ar", "bd3lm", "mdlm", "sedd"])
def test_the_originals_checkpoints_through_all_formats(name, shared, tmp_path):
    """original -> Hub -> safetensors -> Lightning -> Hub: weights and description stay."""
    (path,) = (shared / "golden" / "lightning").glob(f"{name}_text8*.ckpt")
    start = read_checkpoint(str(path))
    places = [str(path), *(str(tmp_path / p) for p in ("hub", "a.safetensors", "a.ckpt", "b"))]
    for source, destination in zip(places[:-1], places[1:], strict=True):
        assert main([source, destination]) == 0
    end = read_weights(places[-1])
    parameters = [k for k in start["state_dict"] if "inv_freq" not in k and "eps" not in k]
    for key, shadow in zip(parameters, start["ema"]["shadow_params"], strict=True):
        assert torch.equal(end.state_dict[key], shadow), key
    assert end.hub_config == read_weights(places[1]).hub_config
    assert (end.hub_config["algo"], end.hub_config["model_length"]) == (name, 64)
    layout = torch.load(places[3], weights_only=True)
    missing = set(start) - set(layout)
    assert missing == {"sampler"}, "all but the position in the original's data"
    assert list(layout["state_dict"]) == list(start["state_dict"])
    done = layout["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
    assert done == 0, "the original reads it"


@pytest.mark.parametrize(("option", "value"), [([], 2.0), (["--ema"], 2.0), (["--raw"], 1.0)])
@pytest.mark.parametrize("destination", ["hub", "a.safetensors", "a.ckpt"])
def test_average_or_weights(destination, option, value, compose, tmp_path):
    model = module(compose, tmp_path, "algo=mdlm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    save_ours(model, tmp_path / "ours.ckpt")
    assert main([str(tmp_path / "ours.ckpt"), str(tmp_path / destination), *option]) == 0
    found = read_weights(str(tmp_path / destination))
    weight = found.state_dict["backbone.blocks.0.norm1.weight"]
    if destination == "a.ckpt":
        assert {float(shadow.mean()) for shadow in found.shadow_params} == {value}
        assert weight.mean() == (value if option else 1.0), "both are kept where none is named"
    else:
        assert found.shadow_params is None and weight.mean() == value


def test_weights_of_a_compiled_network_without_frequencies(compose, tmp_path):
    """Old files: every name has a prefix, and a buffer that is computed may be missing."""
    model = module(compose, tmp_path, "algo=ar")
    state = {k.replace("backbone.", "backbone._orig_mod."): v for k, v in
             model.state_dict().items() if "inv_freq" not in k}  # fmt: skip
    checkpoint = {"state_dict": state}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert main([str(tmp_path / "old.ckpt"), str(tmp_path / "new.ckpt")]) == 0
    new = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert_same(new["state_dict"], model.state_dict())


def test_bare_safetensors_need_a_description(compose, tmp_path, capsys):
    model = module(compose, tmp_path, *ALGOS["bd3lm"])
    safetensors.torch.save_file(model.state_dict(), tmp_path / "bare.safetensors")
    arguments = [str(tmp_path / "bare.safetensors"), str(tmp_path / "hub")]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "bare.safetensors: does not say its algo, model_length, block_size; add --set" in message
    described = ["algo=bd3lm", "model_length=16", "block_size=4"]
    assert main([*arguments, *(part for text in described for part in ("--set", text))]) == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["cross_attn"], config["var_min"], config["block_size"]) == (True, True, 4)
    assert main([*arguments, "--set", "algo=gpt"]) == 1
    assert "--set algo=gpt: allowed are ar, bd3lm, mdlm, sedd" in capsys.readouterr().err
    assert main([*arguments, "--set", "size=1"]) == 1
    assert "--set size: allowed are model_type, vocab_size" in capsys.readouterr().err


def test_ema_of_what_has_none(compose, tmp_path, capsys):
    save_ours(module(compose, tmp_path, "algo=ar"), tmp_path / "ours.ckpt", ema=False)
    assert main([str(tmp_path / "ours.ckpt"), str(tmp_path / "hub"), "--ema"]) == 1
    assert "has no moving average; allowed without --ema" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


# --- the destination -----------------------------------------------------------------------------


def contents(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def exported(compose, tmp_path):
    """A checkpoint, and an earlier export of another one in each format."""
    save_ours(module(compose, tmp_path, "algo=mdlm", "model.n_blocks=1"), tmp_path / "old.ckpt")
    save_ours(module(compose, tmp_path, "algo=mdlm"), tmp_path / "new.ckpt")
    folder = tmp_path / "exports"
    folder.mkdir()
    for name in ("hub", "a.safetensors", "a.ckpt"):
        assert main([str(tmp_path / "old.ckpt"), str(folder / name)]) == 0
    return tmp_path / "new.ckpt", folder


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk")])
@pytest.mark.parametrize("name", ["hub", "a.safetensors", "a.ckpt"])
def test_a_full_disk_leaves_the_old_export(name, error, exported, monkeypatch, capsys):
    source, folder = exported
    before = contents(folder)

    def fail(_content, path, **_options):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise error

    monkeypatch.setattr(hub_directory.safetensors.torch, "save_file", fail)
    monkeypatch.setattr(torch, "save", fail)
    assert main([str(source), str(folder / name)]) == 1
    assert "cannot be written (" in capsys.readouterr().err
    assert contents(folder) == before, "nothing changed, and nothing half-written is left"


@pytest.mark.parametrize("name", ["hub", "a.safetensors", "a.ckpt"])
def test_weights_that_are_no_numbers_are_not_exported(name, exported, capsys):
    source, folder = exported
    before = contents(folder)
    checkpoint = torch.load(source, weights_only=True)
    checkpoint["ema"]["shadow_params"][3][0] = float("nan")
    torch.save(checkpoint, source)
    assert main([str(source), str(folder / name)]) == 1
    assert "backbone.sigma_map.mlp.2.weight holds NaN or infinite" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["hub", "a.safetensors", "a.ckpt"])
def test_an_export_replaces_an_older_one(name, exported):
    source, folder = exported
    (folder / "hub" / "README.md").write_text("a model card")
    assert main([str(source), str(folder / name)]) == 0
    assert read_weights(str(folder / name)).hub_config["n_blocks"] == 2
    assert (folder / "hub" / "README.md").read_text() == "a model card"
    mode = (folder / "hub" / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in folder.rglob("*") if path.is_file()} == {mode}


def test_a_directory_that_cannot_be_made(exported, capsys):
    source, folder = exported
    (folder / "file").write_text("not a directory")
    assert main([str(source), str(folder / "file")]) == 1
    assert main([str(source), str(folder / "nowhere" / "a.ckpt")]) == 1
    assert "nowhere/a.ckpt: cannot be written" in capsys.readouterr().err


def test_hub_directory_of_tensors_that_share_memory(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "backbone.a": shared[:3],
        "backbone.b": shared[1:4],
        "backbone.c": shared.view(2, 3).t(),
    }
    write_hub_directory(tmp_path, state, {"model_type": "bd3lm", "block_size": None})
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "bd3lm"}


def test_configuration_of_a_converted_checkpoint(exported, tmp_path):
    """What is known goes where a run's configuration has it."""
    source, folder = exported
    found = torch.load(folder / "a.ckpt", weights_only=True)["hyper_parameters"]["config"]
    expected = torch.load(source, weights_only=True)["hyper_parameters"]["config"]
    for key in ("algo.name", "algo.parameterization", "model.length", "model.hidden_size"):
        assert OmegaConf.select(OmegaConf.create(found), key) == OmegaConf.select(
            OmegaConf.create(expected), key
        )
