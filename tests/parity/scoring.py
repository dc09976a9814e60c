"""Checks of `gen_ppl.json` (scores of texts) and of `tiny-gpt2`, the scorer that made them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from evaluation.generative_perplexity import GenerativePerplexity
from tests.parity.rows import Row, count_different, relative
from tests.parity.text import TOKENIZERS, data_folder

SCORES = 1e-4
BATCH_SIZES = (1, 4)  # of windows; the original's numbers hold for batch 1


def load_scorer(folder: Path) -> GenerativePerplexity | None:
    """The scorer in a folder; None where it or the tokenizer is missing."""
    data = data_folder(folder)
    if data is None or not folder.is_dir():
        return None
    tokenizer = str(data / TOKENIZERS["gpt2"])
    return GenerativePerplexity.load(
        str(folder.resolve()), device="cpu", tokenizer_name_or_path=tokenizer
    )


def score_rows(path: Path) -> Iterator[Row]:
    """Perplexity, entropy and counted length of every text, per batch size."""
    scorer = load_scorer(path.resolve().parent / "tiny-gpt2")
    if scorer is None:
        yield Row(path.name, "scores (no scorer or no tokenizer here)", None, None)
        return
    entries = json.loads(path.read_text())
    expected = torch.tensor([(e["gen_ppl"], e["entropy"], e["gen_length"]) for e in entries])
    for batch_size in BATCH_SIZES:
        scores = [
            score
            for max_length, group in itertools.groupby(entries, key=lambda e: e["max_length"])
            for score in scorer.score(
                [e["text"] for e in group], max_length=max_length, batch_size=batch_size
            )
        ]
        found = torch.tensor([(s.gen_ppl, s.entropy, s.num_tokens) for s in scores])
        for i, name in enumerate(("perplexity", "entropy", "counted length")):
            difference = relative(found[:, i], expected[:, i])
            yield Row(path.name, f"{name}, batch {batch_size}", difference, SCORES)


def scorer_rows(path: Path) -> Iterator[Row]:
    """Every weight of the file is in the loaded model as it is."""
    scorer = load_scorer(path)
    if scorer is None:
        yield Row(path.name, "weights (no tokenizer here)", None, None)
        return
    loaded = scorer.model.state_dict()
    weights = load_file(path / "model.safetensors")
    unequal = sum(count_different(loaded[name], value) for name, value in weights.items())
    yield Row(path.name, f"unequal entries of {len(weights)} weights", unequal, 0.0)
