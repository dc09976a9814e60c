"""Reading weights from files that are right, and from files that are not."""

import zipfile

import pytest
import torch
from torch import nn

from checkpointing.loading import load_weights
from checkpointing.weights import Weights, read_checkpoint, read_weights
from corpora.tokenization import load_tokenizer
from diffusion import Diffusion
from tests.helpers.small_run import ALGOS, overrides


class Small(nn.Module):
    """A module with two parameters and an optional buffer."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 2)
        self.register_buffer("sampling_eps_min", torch.tensor(0.5))


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "backbone.weight": torch.full((2, 3), value),
        "backbone.bias": torch.full((2,), value),
        "sampling_eps_min": torch.tensor(0.25),
    }


# --- files that cannot be read ---------------------------------------------------------------


@pytest.mark.parametrize("read", [read_checkpoint, read_weights])
def test_missing_file(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.ckpt: there is no such checkpoint"):
        read(str(tmp_path / "gone.ckpt"))


def test_text_file(tmp_path):
    path = tmp_path / "notes.ckpt"
    path.write_text("these are notes, not weights\n")
    with pytest.raises(ValueError, match="notes.ckpt: not a checkpoint that can be read safely"):
        read_weights(str(path))


def test_empty_file(tmp_path):
    path = tmp_path / "empty.ckpt"
    path.touch()
    with pytest.raises(ValueError, match="empty.ckpt: not a checkpoint that can be read safely"):
        read_weights(str(path))


def test_truncated_file(tmp_path):
    """A copy that was interrupted."""
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": state()}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut.ckpt: not a checkpoint that can be read safely"):
        read_weights(str(path))


def test_zip_of_something_else(tmp_path):
    path = tmp_path / "photos.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.txt", "sun")
    with pytest.raises(ValueError, match="photos.ckpt: not a checkpoint that can be read safely"):
        read_weights(str(path))


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(2)])
def test_a_torch_file_without_weights(content, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="other.ckpt: not a Lightning checkpoint"):
        read_weights(str(path))


def test_a_broken_safetensors_file(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no header")
    with pytest.raises(ValueError, match="broken.safetensors: not a safetensors file"):
        read_weights(str(path))


# --- weights that do not fit -----------------------------------------------------------------


def test_all_weights_are_loaded():
    model = Small()
    load_weights(model, Weights("file", state(3.0)), use_ema=True)
    assert torch.equal(model.backbone.weight, torch.full((2, 3), 3.0))
    assert model.sampling_eps_min == 0.25


def test_prefixes_of_a_compiled_network_are_dropped(tmp_path):
    model = Small()
    names = {k.replace("backbone.", "backbone._orig_mod."): v for k, v in state(3.0).items()}
    torch.save({"state_dict": names}, tmp_path / "compiled.ckpt")
    load_weights(model, read_weights(str(tmp_path / "compiled.ckpt")), use_ema=False)
    assert torch.equal(model.backbone.bias, torch.full((2,), 3.0))


def test_derived_buffers_may_be_missing_or_superfluous():
    """Files of mdlm and sedd have no clipped range; a file of bd3lm may be read without one."""
    model = Small()
    tensors = state() | {"sampling_eps_max": torch.tensor(0.9)}
    del tensors["sampling_eps_min"]
    load_weights(model, Weights("file", tensors), use_ema=False)
    assert model.sampling_eps_min == 0.5, "kept"


def test_missing_and_unexpected_keys():
    """Checkpoints were loaded with strict=False: a network of another size kept random weights."""
    model = Small()
    before = model.backbone.bias.detach().clone()
    tensors = {"backbone.bias": torch.zeros(2), "backbone.other": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_weights(model, Weights("some/file.ckpt", tensors), use_ema=False)
    assert "some/file.ckpt: 2 weights do not fit" in str(error.value)
    assert "missing backbone.weight; unexpected backbone.other" in str(error.value)
    assert torch.equal(model.backbone.bias, before), "nothing is loaded"


def test_wrong_shapes():
    tensors = state() | {"backbone.weight": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=r"weight is \(4, 3\) in the file, \(2, 3\) in the model"):
        load_weights(Small(), Weights("file", tensors), use_ema=False)


def test_an_optional_buffer_of_another_shape():
    """Rotary frequencies may be missing; other ones tell of another number of heads."""
    tensors = state() | {"sampling_eps_min": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"sampling_eps_min is \(3,\) in the file, \(\) in the"):
        load_weights(Small(), Weights("file", tensors), use_ema=False)


def test_only_the_first_problems_are_listed():
    tensors = state() | {f"extra{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(ValueError, match="30 weights do not fit") as error:
        load_weights(Small(), Weights("file", tensors), use_ema=False)
    assert str(error.value).count("unexpected extra") == 20
    assert "; .... file: 3 weights matched, 0 missing, 30 unexpected, 0" in str(error.value)


# --- the moving average ----------------------------------------------------------------------


@pytest.mark.parametrize(("use_ema", "value"), [(True, 7.0), (False, 1.0)])
def test_average_is_used_unless_disabled(use_ema, value):
    shadow = [torch.full((2, 3), 7.0), torch.full((2,), 7.0)]
    model = Small()
    load_weights(model, Weights("file", state(), shadow), use_ema=use_ema)
    assert (model.backbone.weight == value).all() and (model.backbone.bias == value).all()
    assert model.sampling_eps_min == 0.25, "buffers are not averaged"


def test_average_of_another_network():
    """The list is positional: one tensor too few would shift all that follow."""
    weights = Weights("file", state(), [torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="ema holds 1 tensors, the model has 2 parameters; eval"):
        load_weights(Small(), weights, use_ema=True)
    load_weights(Small(), weights, use_ema=False)


def test_average_of_wrong_shape():
    weights = Weights("file", state(), [torch.zeros(2), torch.zeros(2, 3)])
    message = r"shadow_params\[0\] is \(2,\), but backbone.weight, .* is \(2, 3\); eval.disable_ema"
    with pytest.raises(ValueError, match=message):
        load_weights(Small(), weights, use_ema=True)


def test_fine_tuning_takes_the_range_from_its_config():
    """The clipped-range buffers start from the config, not from the file."""
    model = Small()
    load_weights(model, Weights("file", state()).without_clipped_range(), use_ema=False)
    assert model.sampling_eps_min == 0.5


def test_the_range_of_a_file_is_trained_on(compose, tmp_path):
    model = Diffusion(compose(overrides(tmp_path, *ALGOS["bd3lm"])), load_tokenizer("bytes"))
    tensors = model.state_dict() | {"sampling_eps_min": torch.tensor(0.3)}
    load_weights(model, Weights("file", tensors), use_ema=False)
    assert (model.interval.low, model.interval.high) == (0.3, 1.0)


# --- the block size ------------------------------------------------------------------------------


@pytest.mark.parametrize(("algo", "expected"), [("bd3lm", 4), ("mdlm", None)])
def test_block_size_of_a_checkpoint(algo, expected, tmp_path):
    path = tmp_path / "some.ckpt"
    config = {"algo": {"name": algo}, "block_size": 4}
    torch.save({"state_dict": state(), "hyper_parameters": {"config": config}}, path)
    assert read_weights(str(path)).block_size == expected
    assert read_weights(str(path)).without_clipped_range().block_size == expected


def test_block_size_of_a_checkpoint_that_does_not_say(tmp_path):
    torch.save({"state_dict": state()}, tmp_path / "some.ckpt")
    assert read_weights(str(tmp_path / "some.ckpt")).block_size is None


def test_a_configuration_with_odd_values_describes_less(tmp_path):
    """Interpolations of the original call resolvers; what is not known is not compared."""
    config = {
        "algo": {"name": "bd3lm", "cross_attn": "${eval:True}"},
        "block_size": "${div_up:${model.length},4}",
        "model": {"length": "${.size}", "n_heads": 2.5, "hidden_size": "${algo.width}"},
    }
    torch.save({"state_dict": state(), "hyper_parameters": {"config": config}}, tmp_path / "a.ckpt")
    found = read_weights(str(tmp_path / "a.ckpt")).hub_config
    assert found["algo"] == "bd3lm"
    keys = ("block_size", "model_length", "n_heads", "hidden_dim", "cross_attn")
    assert [found[key] for key in keys] == [None] * 5


@pytest.mark.parametrize("content", [{"state_dict": []}, {"state_dict": {"a": 1}}])
def test_a_state_dict_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match="a.ckpt: (not a Lightning|'a' in it is no tensor but int)"
    ):
        read_weights(str(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("ema", [[], {"decay": 0.9}, {"shadow_params": [1]}])
def test_an_average_of_something_else(ema, tmp_path):
    torch.save({"state_dict": state(), "ema": ema}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt: its ema has no shadow_params that are a list of"):
        read_weights(str(tmp_path / "a.ckpt"))


def test_what_may_differ_is_named():
    """`eval.allow_missing`: names and patterns, for what is missing, unexpected or reshaped."""
    tensors = {
        "backbone.weight": torch.zeros(4, 3),
        "old.a": torch.zeros(1),
        "old.b": torch.ones(1),
    }
    model = Small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    allowed = ["backbone.bias", "old.*", "*.weight"]
    report = load_weights(model, Weights("f", tensors), use_ema=False, allow_missing=allowed)
    assert report.missing == ("sampling_eps_min", "backbone.bias") and report.matched == ()
    assert report.unexpected == ("old.a", "old.b")
    assert report.reshaped == (("backbone.weight", (4, 3), (2, 3)),)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for fewer in (allowed[:2], allowed[1:], allowed[::2]):
        with pytest.raises(ValueError, match="[12] weights do not fit this configuration"):
            load_weights(model, Weights("f", tensors), use_ema=False, allow_missing=fewer)
