"""Embeddings, resizing and recomputation by transformers' names."""

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from corpora.tokenization import load_tokenizer
from hf import BD3LM
from models.inference import InferenceDIT
from tests.helpers.references import generator
from tests.helpers.twins import tiny


def trained(**changes):
    model = tiny(**changes)
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator(1))
    return model


IDS = torch.randint(0, 19, (2, 8), generator=generator(0))


def test_embeddings_and_head():
    model = trained()
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embed.weight.shape == head.weight.shape == (20, 32)
    names = list(model.state_dict())
    expected = model.eval()(IDS).logits
    model.set_input_embeddings(nn.Embedding.from_pretrained(embed.weight.detach()))
    model.set_output_embeddings(head)
    assert torch.equal(model(IDS).logits, expected) and list(model.state_dict()) == names
    adapted = nn.Sequential(nn.Embedding(20, 32))
    model.set_input_embeddings(adapted)
    assert model.get_input_embeddings() is adapted


@pytest.mark.parametrize("mask_index", [19, 3])
def test_grown_vocabulary(mask_index, tmp_path):
    """No id changes, the mask's neither; saved and loaded, and trained, it is the same model."""
    model = trained(mask_index=mask_index, dropout=0.0)
    ids = IDS.masked_fill(mask_index == IDS, 4)
    before = model(ids).logits
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    layer = model.resize_token_embeddings(23)
    assert layer.weight.shape == (23, 32)
    assert (model.config.vocab_size, model.config.mask_index) == (23, mask_index)
    logits = model(ids).logits
    assert torch.equal(logits[..., :20], before)
    torch.testing.assert_close(logits[..., 21], before.mean(-1))
    new = torch.tensor([[22, 21, 4, 5]]).repeat(8, 1)
    model(new, labels=new, seed=0).loss.backward()
    assert layer.weight.grad[22].any()
    assert (model.generate(num_samples=4) != mask_index).all()
    model.save_pretrained(tmp_path)
    again = BD3LM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, logits)
    assert again.config.mask_index == mask_index
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.config.vocab_size == model(ids).logits.shape[-1] == 24


def test_tokenizer_without_the_mask(caplog):
    """GPT-2's counts one id less than the model: a word added to it would take the mask's."""
    model = tiny()
    with pytest.raises(ValueError, match=r"embeddings\(19\): .* from 20; .*mask_token"):
        model.resize_token_embeddings(19)
    model.resize_token_embeddings(20)
    assert "the mask is id 19" in caplog.text
    with pytest.raises(ValueError, match=r"\(19\): allowed are numbers from 20$"):
        tiny(mask_index=3).resize_token_embeddings(19)
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="before adapters"):
        model.resize_token_embeddings(21)


def test_tokenizer_that_is_told_of_the_mask(tmp_path):
    """What the message says to type: the mask gets its id, and words come behind it."""
    load_tokenizer("bytes").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = tiny(vocab_size=len(tokenizer) + 1, mask_index=len(tokenizer))
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert tokenizer.mask_token_id == model.config.mask_index
    tokenizer.add_tokens(["dog"])
    model.resize_token_embeddings(len(tokenizer))
    assert model.config.vocab_size == tokenizer.convert_tokens_to_ids("dog") + 1


def gradients(model) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}])
def test_recomputed_layers_have_the_same_gradients(options):
    """With dropout; samplers stay fast, and disabling leaves nothing behind."""
    model = trained(dropout=0.5).train()
    expected = gradients(model)
    for _ in range(2):
        model.activation_checkpointing_enable(**options)
    assert all(map(torch.equal, gradients(model), expected))
    model.get_input_embeddings()._forward_hooks.clear()  # of `enable_input_require_grads`
    assert isinstance(model.denoiser.for_sampling().backbone, InferenceDIT)
    assert model.generate().shape == (1, 8)
    model.activation_checkpointing_disable()
    assert not any("forward" in vars(block) for block in model.backbone.blocks)
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
