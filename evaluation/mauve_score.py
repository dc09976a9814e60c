"""MAUVE (2102.01454): how close samples are to real text, seen by the features of a network.

A value means something only beside the featuriser's name and the number of texts.
"""

import contextlib
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import transformers
from torch import Tensor

from corpora.lines import without_surrogates
from evaluation.generative_perplexity import full_precision, load_network

# As the authors measured it; a network with a shorter context sees that much.
WINDOW = 1024
# k-means makes a bucket of every ten texts: with fewer than two buckets there is nothing to see.
MIN_TEXTS = 20
# From here on values of different runs compare, the authors say (5,000 are what they use).
ENOUGH_TEXTS = 1000


class MauveUnavailableError(OSError):
    """MAUVE cannot be computed here; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Mauve:
    """MAUVE of two sets of texts, a value for each seed of k-means."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


class Featurizer:
    """The last token's last hidden state in any network of transformers, as mauve-text takes it."""

    def __init__(
        self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.window = min(WINDOW, context or WINDOW)

    @classmethod
    def load(cls, name_or_path: str, *, device: torch.device | str, key: str) -> Self:
        """Loads network and tokenizer in float32; code from the Hub is never run.

        Args:
            name_or_path: a Hub id such as gpt2-large, or a directory in Hub format.
            device: where the network shall run.
            key: the option that named it, for the message.

        Raises:
            MauveUnavailableError: unreachable, broken, or without some weights.
        """
        try:
            # A pooling layer works on top of the features.
            model, tokenizer = load_network(transformers.AutoModel, name_or_path, spare="pooler")
            return cls(model.to(device), tokenizer)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... here
            raise MauveUnavailableError(
                f"{key}={name_or_path!r} cannot be loaded. Allowed: a network on the Hugging Face "
                "Hub, a local directory with its config.json, weights and tokenizer files (the way "
                f"without a network), or null to skip MAUVE. Cause: {error}"
            ) from error

    @torch.inference_mode()
    def features(self, texts: Sequence[str]) -> np.ndarray:
        """Features (n, d) of n texts in one forward pass; what lies behind the context is cut.

        Raises:
            ValueError: a text has no token, or the tokenizer is another network's.
        """
        rows = [self._encode(text) for text in texts]
        device = self.model.device
        # Pads stand on the right and are masked; a causal network does not even reach them.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (n, T)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) <= last[:, None]
        with full_precision(device):
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states[torch.arange(len(rows), device=device), last].float().cpu().numpy()

    def _encode(self, text: str) -> Tensor:
        ids = self.tokenizer(without_surrogates(text), truncation=True, max_length=self.window)
        ids = ids["input_ids"]
        size = self.model.get_input_embeddings().num_embeddings
        if not ids:
            raise ValueError(f"the featuriser's tokenizer finds no token in {text!r:.60}")
        if max(ids) >= size:  # on a GPU this would end the whole process
            raise ValueError(
                f"the featuriser's tokenizer made token {max(ids)}, and its network has {size} "
                "tokens: the two do not belong together"
            )
        return torch.tensor(ids, dtype=torch.int64)


def import_mauve() -> Callable:
    """`compute_mauve` of mauve-text, which nothing else here needs.

    Raises:
        MauveUnavailableError: it is not installed; the message says how to.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise MauveUnavailableError(
            "MAUVE needs the package mauve-text: pip install -r requirements-eval.txt "
            f"(cause: {error})"
        ) from error
    return compute_mauve


def mauve(p: np.ndarray, q: np.ndarray, *, seeds: Sequence[int]) -> Mauve:
    """MAUVE of features (n, d) and (m, d), with the settings of the paper (c = 5, n / 10 buckets).

    Args:
        p, q: of texts of the same number on both sides, or else values do not compare.
        seeds: k-means begins anew with each.

    Raises:
        MauveUnavailableError: mauve-text is missing.
        ValueError: too few texts, or features that are not finite.
    """
    compute_mauve = import_mauve()
    if min(len(p), len(q)) < MIN_TEXTS:
        raise ValueError(
            f"MAUVE needs at least {MIN_TEXTS} texts on each side, and there are "
            f"{min(len(p), len(q))}; {ENOUGH_TEXTS:,} or more are usual"
        )
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise ValueError("the featuriser's features are not finite")
    values = []
    for seed in seeds:
        with _quiet():
            result = compute_mauve(p_features=p, q_features=q, seed=seed)
        # The curve of equal histograms is two points, whose order mauve-text leaves to chance:
        # it says 0.75 or 1.
        is_equal = np.array_equal(result.p_hist, result.q_hist)
        values.append(1.0 if is_equal else float(result.mauve))
    return Mauve(values=tuple(values))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard error: faiss finds ten texts per bucket few, which is MAUVE's own rule.

    It is C++ that prints this, past `sys.stderr`.
    """
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # features that are all the same
            yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
