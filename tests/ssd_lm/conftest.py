"""A tiny SSD-LM and a tiny scorer with random weights; `ssd-lm/` made importable."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

from corpora.tokenization import byte_tokenizer
from tests.helpers.places import PROJECT

# No import statement can name this folder, because of its dash.
sys.path.append(str(PROJECT / "ssd-lm"))

from ssd_model import EMBED_SUM, TIMESTEP

VOCAB_SIZE, HIDDEN = 260, 16  # V is the byte tokenizer's


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A directory with all files of a tiny SSD-LM and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-ssdlm")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(folder)
    embed_sum, timestep = torch.randn(HIDDEN, VOCAB_SIZE), torch.randn(HIDDEN, 1)
    torch.save({"weight": embed_sum}, folder / EMBED_SUM)
    torch.save({"module.weight": timestep, "module.bias": torch.randn(HIDDEN)}, folder / TIMESTEP)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A copy of that directory, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Path:
    """A directory with a tiny causal language model."""
    folder = tmp_path_factory.mktemp("tiny-scorer")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
