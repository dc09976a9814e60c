"""A network that scores and featurises texts, small enough to be made for a test."""

from pathlib import Path

import torch
import transformers

from corpora.tokenization import byte_tokenizer


def save_byte_scorer(folder: Path, *, context: int = 16) -> str:
    """A random GPT-2 over bytes and its tokenizer, as the Hub keeps one; returns the folder."""
    tokenizer = byte_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=context,
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
