"""The model as a class of transformers, beside the Lightning module and the original's results."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf import BD3LM, BD3LMConfig
from likelihood.scoring import token_log_likelihood
from losses.forward_process import FULL
from losses.objectives import masked_mean
from models.dit import DIT
from models.masks import AttentionPattern
from sampling.options import SamplingOptions
from tests.helpers.references import generator
from tests.helpers.small_module import batches
from tests.helpers.small_run import ALGOS
from tests.helpers.twins import OPTIONS, tiny, twins

PUBLISHED = ("bd3lm-block_size4", "bd3lm-block_size32-pretrain", "mdlm")
@pytest.fixture
def build(compose, tmp_path):
    """Builds a Lightning module and its twin: `build("ar")`."""
    return lambda algo, *changes: twins(compose, tmp_path, algo, *changes)


# --- likelihoods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", [algo for algo in ALGOS if algo != "sedd"])
def test_likelihoods_are_those_of_the_lightning_module(algo, build):
    """nats per block, from the method and from the function that takes either."""
    module, model = build(algo)
    x = next(iter(batches(1, batch_size=2)))["input_ids"]
    found = model.token_log_likelihood(x, estimator="left_to_right")
    assert found.shape == (2, x.shape[1] // module.block_size) and (found < 0).all()
    expected = token_log_likelihood(module.train(), x, estimator="left_to_right")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert module.training, "dropout was off meanwhile"


def test_likelihoods_of_half_precision_and_what_is_refused():
    model = tiny().eval()
    x = torch.randint(5, (2, 8), generator=generator(0))
    full = model.token_log_likelihood(x, estimator="any_order")
    half = model.bfloat16().token_log_likelihood(x, estimator="any_order")
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="eval.likelihood=best: allowed are nelbo"):
        model.token_log_likelihood(x, estimator="best")
    with pytest.raises(ValueError, match="given of shape"):
        model.token_log_likelihood(x, given=torch.ones(2, 3, dtype=torch.bool))


# --- published directories -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_directory_gives_the_originals_logits(name, shared):
    """The files as they are, through `from_pretrained`, called as their users do."""
    folder = shared / "golden/hub" / name
    expected = load_file(folder / "expected.safetensors")
    model, loading = BD3LM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    x = torch.cat([expected[key] for key in ("xt", "x0") if key in expected], dim=1)
    with torch.no_grad():
        output = model(input_ids=x, timesteps=torch.zeros(len(x)), return_dict=True)
        as_tuple = model(x, return_dict=False)
    assert (output.logits - expected["logits"]).abs().max() <= 2e-5
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


def test_mdlm_directory_is_one_block_without_a_clean_half(shared):
    config = BD3LMConfig.from_pretrained(shared / "golden/hub/mdlm")
    assert (config.block_size, config.cross_attn, config.var_min) == (32, False, False)
    assert config.model_type == config.to_dict()["model_type"] == "bd3lm"


def test_code_of_a_directory_is_not_run(tmp_path):
    """Whatever `auto_map` says: this class reads sizes and tensors."""
    tiny().save_pretrained(tmp_path)
    marker = tmp_path / "was_run"
    (tmp_path / "modeling_bd3lm.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (tmp_path / "configuration_bd3lm.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    BD3LM.from_pretrained(tmp_path)
    assert not marker.exists()


def test_foreign_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type=llama, allowed are bd3lm and mdlm"):
        BD3LM.from_pretrained(tmp_path)


def test_ids_of_gpt2_are_known_and_others_asked_for():
    """Guessed ids would make garbage of every sample without a word."""
    config = BD3LMConfig()
    assert (config.mask_index, config.bos_token_id, config.eos_token_id) == (50257, 50256, 50256)
    model = tiny(mask_index=None)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert model(ids, sample_mode=True).logits.shape == (1, 4, 20)
    for call in (lambda: model.generate(), lambda: model(ids, labels=ids)):
        with pytest.raises(ValueError, match="mask_index"):
            call()


def test_sedd_and_timed_mdlm_are_told_apart_or_asked_for():
    """Their networks look the same: samples of the wrong one are garbage."""
    model = tiny(cross_attn=False, time_conditioning=True)
    with pytest.raises(ValueError, match="parameterization: config.json"):
        model.generate(num_steps=2)
    model.config.parameterization = "sedd"
    assert model.generate(num_steps=2).shape == (1, 8)


def test_unknown_parameterization():
    with pytest.raises(ValueError, match="parameterization=x: allowed are subs, sedd, ar"):
        tiny(parameterization="x")


# --- weights --------------------------------------------------------------------------------------


def same_scheme(model: BD3LM) -> None:
    """Every tensor is as `DIT` makes it: equal where that is constant, else alike in spread."""
    fresh = DIT(model.backbone.config).state_dict()
    for name, found in model.backbone.state_dict().items():
        expected = fresh[name]
        assert not found.is_meta and found.isfinite().all(), name
        if expected.std() == 0 or "inv_freq" in name:
            assert torch.equal(found, expected), name
        else:
            bound = 1 / math.sqrt(expected.shape[-1]) if expected.ndim == 2 else None
            if bound:  # uniform between -bound and bound
                assert 0.8 * bound < found.abs().max() <= bound, name
                assert found.std() == pytest.approx(bound / math.sqrt(3), rel=0.2), name
            else:
                assert 0 < found.abs().max() <= 1, name


@pytest.mark.parametrize("adaln", [True, False])
def test_fresh_model_is_initialised_as_the_network_is(adaln):
    same_scheme(tiny(adaln=adaln))


def test_missing_tensors_are_initialised_and_the_others_kept(tmp_path):
    """The model is built without memory, and what a file lacks gets the network's own values."""
    model = tiny(sampling_eps_min=0.3, sampling_eps_max=1)
    model.save_pretrained(tmp_path)
    kept = {"backbone.blocks.0.attn_qkv.weight": torch.full((96, 32), 7.0)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = BD3LM.from_pretrained(tmp_path)
    assert (found.backbone.blocks[0].attn_qkv.weight == 7).all()
    assert found.sampling_eps_min == torch.tensor(0.3)
    assert torch.equal(found.sampling_eps_max, torch.tensor(1.0)), "whole in JSON, a float here"
    found.backbone.blocks[0].attn_qkv = model.backbone.blocks[0].attn_qkv
    same_scheme(found)


@pytest.mark.parametrize("algo", ALGOS)
def test_names_are_those_of_checkpoints(algo, build):
    lightning, model = build(algo)
    assert list(model.state_dict()) == [
        *(name for name in lightning.state_dict() if "sampling_eps" in name),
        *(name for name in lightning.state_dict() if "sampling_eps" not in name),
    ]


@pytest.mark.parametrize("algo", ALGOS)
def test_saved_and_loaded_is_bit_equal(algo, build, tmp_path):
    _, model = build(algo)
    model.save_pretrained(tmp_path / "saved")
    again = BD3LM.from_pretrained(tmp_path / "saved")
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- logits and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGOS)
def test_logits_of_a_text_are_those_of_the_samplers(algo, build):
    lightning, model = build(algo)
    x = next(iter(batches(1)))["input_ids"]
    sigma = torch.rand(len(x), generator=generator(2)) if algo == "sedd" else None
    found = model(x, timesteps=sigma, sample_mode=True).logits
    pattern = {"ar": AttentionPattern.CAUSAL, "bd3lm": AttentionPattern.BLOCK_CAUSAL}.get(
        algo, AttentionPattern.FULL
    )
    assert torch.equal(found, lightning.denoiser.logits(x, sigma, pattern=pattern))


@pytest.mark.parametrize("algo", ALGOS)
def test_loss_is_what_validation_reports_for_that_draw(algo, build):
    """A seeded draw; NELBO over the full range without position 0, the exact NLL for ar."""
    lightning, model = build(algo)
    batch = next(iter(batches(1)))
    x_0, attention_mask = batch["input_ids"], batch["attention_mask"].clone()
    attention_mask[1, 10:] = 0
    torch.manual_seed(5)
    losses = lightning.token_losses(x_0, interval=FULL)
    mask = lightning.loss_mask(attention_mask, is_training=False)
    expected = masked_mean(losses, mask=mask)
    output = model(x_0, attention_mask=attention_mask, labels=x_0, seed=5)
    assert torch.equal(output.loss, expected)
    assert output.logits.shape == (*x_0.shape, 35)

    labels = x_0.masked_fill(attention_mask == 0, -100)
    assert torch.equal(model(x_0, labels=labels, seed=5).loss, expected)
    torch.manual_seed(5)
    assert torch.equal(model(x_0, labels=labels).loss, expected), "torch's own stream"
    other = model(x_0, labels=labels, seed=6).loss
    assert torch.equal(other, expected) == (algo == "ar")


def test_loss_trains_every_parameter(build):
    _, model = build("bd3lm")
    x = next(iter(batches(1)))["input_ids"]
    model.train()(x, labels=x).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_hidden_states():
    """Into the first block and out of each; the last one leads to the logits."""
    model = tiny(cross_attn=False).eval()
    torch.nn.init.normal_(model.backbone.output_layer.linear.weight)
    x = torch.randint(0, 20, (2, 8), generator=generator(0))
    output = model(x, output_hidden_states=True)
    first, _, last = output.hidden_states
    assert torch.equal(first, model.backbone.vocab_embed(x))
    condition = model.backbone.condition(None, indices=x)
    logits = model.backbone.output_layer(last, condition=condition, logits_at=None)
    assert torch.equal(logits, output.logits) and logits.std() > 0
    assert model(x).hidden_states is None
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_do_not_fit():
    model = tiny()
    with pytest.raises(ValueError, match="input_ids has 7 tokens"):
        model(torch.zeros(1, 7, dtype=torch.int64))
    for nothing in (torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(4).long()):
        with pytest.raises(ValueError, match="input_ids of shape .* at least one"):
            model(nothing)
    ids = torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels: rows of 6 tokens, .* block_size=4"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match=r"labels of shape \(1, 4\): .*\(1, 8\)"):
        model(torch.zeros(1, 8, dtype=torch.int64), labels=ids[:, :4])


def test_half_precision(build, tmp_path):
    """Weights in bfloat16: the same up to rounding; angles and the range keep their digits."""
    _, model = build("bd3lm", "training.sampling_eps_min=0.3")
    x = next(iter(batches(1)))["input_ids"]
    model.save_pretrained(tmp_path / "saved")
    half = BD3LM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    assert torch.equal(half.backbone.rotary_emb.inv_freq, model.backbone.rotary_emb.inv_freq)
    assert half.sampling_eps_min == model.sampling_eps_min
    expected, found = model(x, labels=x, seed=1), half(x, labels=x, seed=1)
    torch.testing.assert_close(found.logits.float(), expected.logits, atol=0.05, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=0.05, rtol=0)
    assert half.generate(num_samples=2, kv_cache=True).shape == (2, 16)


def test_arguments_that_any_model_is_given():
    """BERT's tokenizer makes token_type_ids; PEFT and trainers name the arguments of all models."""
    model, ids = tiny().eval(), torch.ones(1, 8, dtype=torch.int64)
    given = {"token_type_ids": ids, "inputs_embeds": None, "output_attentions": False}
    assert torch.equal(model(ids, **given).logits, model(ids).logits)
    assert model.generate(ids[:, :2], token_type_ids=ids[:, :2]).shape == (1, 8)
    with pytest.raises(ValueError, match=r"forward\(inputs_embeds=...\): .* allowed are input_ids"):
        model(ids, inputs_embeds=torch.zeros(1, 8, 32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_cast_by_hand(dtype):
    """`model.double()` failed, and `model.bfloat16()` rounded the angles of the positions."""
    model = tiny().eval()
    torch.nn.init.normal_(model.backbone.output_layer.linear.weight)
    kept = [model.backbone.rotary_emb.inv_freq.clone(), model.sampling_eps_min.clone()]
    ids = torch.randint(0, 19, (2, 8), generator=generator(0))
    expected = model(ids, labels=ids, seed=1)
    model.to(dtype)
    found = model(ids, labels=ids, seed=1)
    rough = {"atol": 0.1, "rtol": 0.05} if dtype.itemsize < 4 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(found.logits.float(), expected.logits, **rough)
    torch.testing.assert_close(found.loss.float(), expected.loss, **rough)
    found.loss.backward()
    left = [model.backbone.rotary_emb.inv_freq, model.sampling_eps_min]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(left, kept, strict=True))
    assert model.generate(num_samples=2, kv_cache=True).shape == (2, 8)


@pytest.mark.parametrize("cross_attn", [True, False])
def test_forward_compiles(cross_attn):
    """Building a frozen dataclass in a compiled forward pass ended in an error of the compiler."""
    model = tiny(cross_attn=cross_attn, model_length=128).eval()
    torch.nn.init.normal_(model.backbone.output_layer.linear.weight)
    ids = torch.randint(0, 19, (1, 256), generator=generator(0))
    with torch.no_grad():
        expected = model(ids).logits
        torch.compiler.reset()
        found = torch.compile(model, backend="eager")(ids).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_the_loss_compiles():
    """torch 2.11 hashed the losses' dataclass before it had any attributes, and failed."""
    model = tiny(model_length=16).eval()
    torch.nn.init.normal_(model.backbone.output_layer.linear.weight, std=0.1)
    ids = torch.randint(0, 19, (2, 16), generator=generator(0))
    torch.compiler.reset()
    found = {}
    for call in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = call(ids, labels=ids, seed=0).loss
        loss.backward()
        found[call] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for plain, compiled in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled, plain)


# --- sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("algo", ALGOS)
def test_samples_are_those_of_the_lightning_module(algo, build):
    lightning, model = build(algo)
    options = SamplingOptions(**OPTIONS[algo], min_entropy=None)
    expected = lightning.generate(num_samples=3, options=options, seed=4)
    output = model.generate(num_samples=3, seed=4, return_dict_in_generate=True, **OPTIONS[algo])
    for name, value in vars(expected).items():
        assert torch.equal(getattr(output, name), value), name
    tokens = model.generate(num_samples=3, seed=4, **OPTIONS[algo])
    assert torch.equal(tokens, expected.tokens)


def test_sampling_draws_without_dropout_and_restores_the_mode(build):
    _, model = build("bd3lm", "model.dropout=0.5")
    expected = model.generate(seed=1)
    assert torch.equal(model.train().generate(seed=1), expected) and model.training


@pytest.mark.parametrize("algo", ["ar", "bd3lm", "mdlm"])
def test_prompts_of_different_lengths(algo, build):
    """BOS before, padding behind; each row goes on from its own end."""
    _, model = build(algo)
    bos, mask = model.config.bos_token_id, model.config.mask_index
    prompts = torch.tensor([[9, 10, 11], [12, 0, 0]])
    attention_mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    output = model.generate(
        prompts, attention_mask, max_new_tokens=4, return_dict_in_generate=True
    )
    assert output.lengths.tolist() == [8, 6]
    assert output.tokens[0, :4].tolist() == [bos, 9, 10, 11]
    assert output.tokens[1, :2].tolist() == [bos, 12]
    for row, length in zip(output.tokens, output.lengths.tolist(), strict=True):
        assert (row[:length] != mask).all()
    with_bos = torch.cat((torch.full((2, 1), bos), prompts), dim=1)
    wide = torch.cat((torch.ones(2, 1), attention_mask), dim=1)
    again = model.generate(with_bos, wide, max_new_tokens=4)
    assert torch.equal(again, output.tokens[:, :8])


def test_gaps_are_filled_and_the_rest_stays(build):
    _, model = build("mdlm")
    mask = model.config.mask_index
    canvas = torch.tensor([[model.config.bos_token_id, 9, mask, mask, 10, 11]])
    tokens = model.generate(canvas, max_new_tokens=0)
    assert tokens.shape == (1, 6)
    assert torch.equal(tokens[canvas != mask], canvas[canvas != mask])
    assert (tokens != mask).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, r"generate\(num_beams=4\): .* allowed are first_hitting, .*nucleus_p"),
        ({"nucleus_p": 2}, "nucleus_p=2: allowed is a number"),
        ({"first_hitting": False}, "num_steps=0: allowed are integers from 1"),
        ({"input_ids": torch.ones(1, 9).long()}, "prompt of 10 tokens .* max_length=8"),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[1, 0, 1]])},
            "padding before or behind a prompt",
        ),
    ],
    ids=["option", "value", "steps", "length", "padding"],
)
def test_bad_arguments_of_generate(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(**arguments)
