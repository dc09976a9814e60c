"""`generate` as users of transformers call it."""

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from hf.generation_options import asked_for
from tests.helpers.references import generator
from tests.helpers.twins import tiny

NAMES = {"ar": {"causal": True}, "bd3lm": {}, "mdlm": {"cross_attn": False, "block_size": 8}}


def trained(algo: str = "bd3lm"):
    """A model whose logits differ from one another, so that a change of tokens shows."""
    model = tiny(**NAMES[algo]).eval()
    g = generator(1)
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.3, generator=g)
    return model


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"top_p": 0.8}, {"nucleus_p": 0.8, "nucleus_rule": "standard"}),
        ({"top_p": 0.8, "nucleus_rule": "paper"}, {"nucleus_p": 0.8, "nucleus_rule": "paper"}),
        ({"top_k": 0}, {"top_k": None}),
        ({"use_cache": True}, {"kv_cache": True}),
        ({"eos_token_id": 0}, {"stop_on_eos": True}),
        ({"eos_token_id": [0], "stop_on_eos": False}, {"stop_on_eos": False}),
        ({"stop_strings": "a", "decode": str}, {"stop_strings": ("a",), "decode": str}),
        ({"num_beams": 1, "streamer": None, "output_scores": False, "bos_token_id": 0}, {}),
    ],
)
def test_their_names_mean_ours(theirs, ours):
    """Typed or in a generation_config, whose ids count; what is typed wins."""
    config = tiny().config
    assert asked_for(theirs, given=None, stored=None, config=config) == ours
    held = {k: v for k, v in theirs.items() if k in vars(GenerationConfig()) and v is not None}
    others = {k: v for k, v in theirs.items() if k not in held}
    given = GenerationConfig(**held)
    assert asked_for(others, given=given, stored=None, config=config) == ours
    stored = GenerationConfig(temperature=3.0, eos_token_id=0, top_k=7)
    found = asked_for({"top_k": 2}, given=None, stored=stored, config=config)
    assert found == {"temperature": 3.0, "top_k": 2}, "ids of the stored one ask for nothing"
    greedy = GenerationConfig(do_sample=False)
    assert asked_for({"temperature": 0.5}, given=greedy, stored=None, config=config) == {
        "temperature": 0.5
    }


def test_cache_where_there_can_be_one():
    """`use_cache` asks for speed, and every caller of transformers does."""
    for algo, expected in (("ar", True), ("bd3lm", True), ("mdlm", False)):
        found = asked_for({"use_cache": True}, given=None, stored=None, config=trained(algo).config)
        assert found == {"kv_cache": expected}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"do_sample": False, "temperature": 0.7}, "do_sample=False, temperature=0.7"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True, temperature=0"),
        ({"top_p": 0.9, "nucleus_p": 0.9}, "top_p=0.9, nucleus_p=0.9"),
        ({"eos_token_id": 5}, "eos_token_id=5.*allowed is this model's 0; stop_strings"),
        ({"bos_token_id": 5}, "bos_token_id=5.*allowed is this model's 0"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2.*allowed are"),
        ({"output_scores": True}, "output_scores=True.*allowed are"),
        ({"nucleus": 0.9}, "nucleus=0.9.*allowed are"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1.*from 0"),
        ({"num_samples": 0}, "num_samples=0.*from 1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0.*from 1"),
        ({"input_ids": [[1, 20]]}, "ids from 1 to 20, allowed are 0 to 19"),
        ({"input_ids": [1, 2]}, r"input_ids of shape \(2,\): allowed is \(B, P\)"),
        ({"max_length": 0}, "max_length=0.*from 1"),
        ({"top_p": 1.5}, "nucleus_p=1.5"),
    ],
)
def test_what_contradicts_or_is_unknown(typed, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(**typed)


def test_their_options_through_generate():
    model = trained("ar")
    prompt = torch.tensor([[3, 4]])
    greedy = [model.generate(prompt, do_sample=False, seed=seed) for seed in (0, 1)]
    assert torch.equal(*greedy)
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(prompt, generation_config=config), greedy[0][:, :6])
    model.generation_config.max_new_tokens = 2
    assert model.generate(inputs=prompt).shape == (1, 5)
    model.generation_config.max_new_tokens = None
    many = model.generate(torch.tensor([[3], [4]]), num_return_sequences=3, temperature=5.0)
    assert many[:, 1].tolist() == [3, 3, 3, 4, 4, 4]
    assert len(set(map(tuple, many[:3].tolist()))) == 3


def test_padding_token():
    """Behind a text that ended; EOS unless another is asked for."""
    model = trained("ar")
    model.backbone.output_layer.linear.bias.data[0] = 100  # EOS at once
    tokens = model.generate(torch.tensor([[3]]), eos_token_id=0, pad_token_id=7, max_new_tokens=4)
    assert tokens.tolist() == [[0, 3, 0, 7, 7, 7]]


def test_prompt_tuning_is_refused():
    """PEFT replaces this method; nothing here would call it, so the prompts would do nothing."""
    model = tiny()
    model.prepare_inputs_for_generation = tiny().prepare_inputs_for_generation
    with pytest.raises(ValueError, match="prompt tuning"):
        model.generate()


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", NAMES)
def test_left_padding_is_right_padding_moved(algo):
    """The same texts; in the result all prompts end in the same place, as they did."""
    model, pad = trained(algo), 5
    right = torch.tensor([[9, 10, 11], [12, pad, pad]])
    left = torch.tensor([[9, 10, 11], [pad, pad, 12]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = model.generate(right, mask, max_new_tokens=4, pad_token_id=pad)
    found = model.generate(left, mask.flip(1), max_new_tokens=4, pad_token_id=pad)
    assert expected.shape == (2, 8) and found.shape == (2, 10)
    assert torch.equal(found[0, :8], expected[0])
    assert torch.equal(found[1], torch.cat((torch.tensor([pad, pad]), expected[1])))
    assert found[:, 3].tolist() == [11, 12]


@pytest.mark.parametrize("algo", NAMES)
def test_empty_prompts(algo):
    """A tokenizer makes floats of no text; a row without tokens is BOS alone."""
    model = trained(algo)
    expected = model.generate(num_samples=2)
    assert torch.equal(model.generate(torch.zeros(2, 0), torch.zeros(2, 0)), expected)
    ids, mask = torch.full((2, 1), 7), torch.zeros(2, 1, dtype=torch.int64)
    assert torch.equal(model.generate(ids, mask), expected)
    bos, mask = torch.tensor([[0, 3], [7, 7]]), torch.tensor([[1, 1], [0, 0]])
    found = model.generate(bos, mask)
    assert found[:, 0].tolist() == [0, 0] and found[0, 1] == 3
    assert torch.equal(found[1], expected[1])


def test_masks_of_another_shape():
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\): .*\(1, 2\)"):
        tiny().generate(torch.ones(1, 2).long(), torch.ones(1, 3))
