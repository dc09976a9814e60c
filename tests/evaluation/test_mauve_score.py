"""MAUVE: the features are mauve-text's own, and the value tells texts apart."""

import sys

import numpy as np
import pytest
import torch
import transformers

from corpora.tokenization import byte_tokenizer
from evaluation.mauve_score import (
    MIN_TEXTS,
    Featurizer,
    Mauve,
    MauveUnavailableError,
    import_mauve,
    mauve,
)
from tests.helpers.byte_scorer import save_byte_scorer

TEXTS = ["a text that is longer than the context of 16", "short", "x", "another one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 over bytes with a context of 16 tokens."""
    return save_byte_scorer(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def featurizer(folder) -> Featurizer:
    return Featurizer.load(folder, device="cpu", key="--featurizer")


@pytest.fixture(scope="module")
def package():
    """mauve-text, without which the project runs too."""
    return pytest.importorskip("mauve", reason="needs mauve-text, see requirements-eval.txt")


def test_features_are_those_of_mauve_text(featurizer, package):
    """The last hidden state of the last token, pads or not; a text ends where the context does."""
    from mauve.utils import featurize_tokens_from_model

    tokens = [
        featurizer.tokenizer.encode(text, return_tensors="pt", truncation=True, max_length=16)
        for text in TEXTS
    ]
    expected = featurize_tokens_from_model(featurizer.model, tokens, batch_size=1).numpy()
    np.testing.assert_allclose(featurizer.features(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(featurizer.features(TEXTS[2:]), expected[2:], atol=1e-6)
    cut = featurizer.features([TEXTS[0][:16]])
    np.testing.assert_allclose(cut, expected[:1], atol=1e-6)


def test_an_encoder_featurises_too(tmp_path):
    """BERT is no causal model and its [CLS] ... [SEP] belong to a text; its pooling layer may lack.

    ModernBERT, which some use instead of GPT-2 large, is one of these.
    """
    tokenizer = byte_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    featurizer = Featurizer.load(str(tmp_path), device="cpu", key="--featurizer")
    together, alone = featurizer.features(TEXTS), featurizer.features(TEXTS[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-6)  # pads are not attended to


def features(seed: int, *, mean: float = 0.0, num: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, size=(num, 8)).astype(np.float32)


def test_mauve_tells_texts_apart(package, capfd):
    """The same set 1, another of the same kind nearly 1, one of another kind much less."""
    p, seeds = features(0), range(5)
    assert mauve(p, p, seeds=seeds).values == (1.0,) * 5
    alike, other = mauve(p, features(1), seeds=seeds), mauve(p, features(1, mean=1.0), seeds=seeds)
    assert alike.mean > 0.8 and other.mean < 0.3
    assert len(set(alike.values)) > 1  # the seed of k-means matters
    assert capfd.readouterr().err == ""  # faiss prints a warning for each


def test_equal_histograms_give_one(package):
    """mauve-text says 0.75 of these for some seeds: the order of two equal points was chance."""
    p = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    assert mauve(p, p, seeds=range(3)).values == (1.0, 1.0, 1.0)


def test_mean_over_seeds():
    assert Mauve(values=(0.5, 0.75)).mean == 0.625


def test_what_mauve_refuses(package):
    p = features(0, num=MIN_TEXTS - 1)
    with pytest.raises(ValueError, match="at least 20 texts on each side, and there are 19"):
        mauve(p, features(1), seeds=[0])
    with pytest.raises(ValueError, match="not finite"):
        mauve(features(0) * np.nan, features(1), seeds=[0])


def test_without_mauve_text(monkeypatch):
    """One line says how to install it."""
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(MauveUnavailableError, match="pip install -r requirements-eval.txt"):
        import_mauve()


@pytest.mark.parametrize("defect", ["missing", "half"])
def test_a_network_that_cannot_be_loaded(folder, tmp_path, defect):
    """The message names option, value, what is allowed, and the cause."""
    path = tmp_path / "featuriser"
    if defect == "half":
        model = transformers.AutoModel.from_pretrained(folder)
        state = {k: v for k, v in model.state_dict().items() if "ln_f" not in k}
        model.save_pretrained(path, state_dict=state)
        byte_tokenizer().save_pretrained(path)
    cause = {"missing": "no such directory", "half": "lack the weights"}[defect]
    with pytest.raises(MauveUnavailableError, match=f"--featurizer='.*' cannot be.*{cause}"):
        Featurizer.load(str(path), device="cpu", key="--featurizer")


def test_texts_that_no_network_takes(featurizer, monkeypatch):
    with pytest.raises(ValueError, match="finds no token in ''"):
        featurizer.features(["a", ""])
    monkeypatch.setattr(featurizer, "tokenizer", lambda *_, **__: {"input_ids": [5, 999]})
    with pytest.raises(ValueError, match="made token 999, and its network has 260"):
        featurizer.features(["a"])
