"""The estimators on a checkpoint of the original, against sums made by enumeration elsewhere."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from corpora.tokenization import load_tokenizer
from likelihood.estimators import Estimator
from likelihood.scoring import Scores, score, token_log_likelihood
from modes.starting_weights import load_model
from tests.parity.published import golden_config, lightning_overrides
from tests.parity.rows import load_golden

NAMES = {
    "nelbo_exact": {},
    "any_order": {},
    "left_to_right": {},
    "confidence": {},
    "margin": {},
    "entropy": {},
    "strided, 2 tokens per pass": {"tokens_per_pass": 2},
    "left_to_right, 2 tokens per pass": {"tokens_per_pass": 2},
    "whole block in one pass": {"likelihood": "left_to_right", "tokens_per_pass": 4},
}


@cache
def golden_model(folder: Path, name: str):
    """A golden checkpoint and its rows."""
    path = folder / f"lightning/{name}.ckpt"
    golden = load_golden(path.with_suffix(".expected.safetensors"))
    config = golden_config(lightning_overrides(path, golden))
    return load_model(config, load_tokenizer(golden.meta["tokenizer"])), golden["x0"]


def nll(scores: Scores, x_0: torch.Tensor) -> float:
    """Nats per predicted token."""
    return -scores.log_p.sum().item() / (x_0.numel() - len(x_0))


@pytest.mark.parametrize("name", NAMES)
def test_enumerated(name, shared):
    expected = json.loads((shared / "golden/exact_likelihood.json").read_text())[name]
    model, x_0 = golden_model(shared / "golden", "bd3lm_text8_block_size4")
    settings = {"likelihood": name.split(",")[0]} | NAMES[name]
    assert nll(score(model.losses, x_0, Estimator(**settings)), x_0) == pytest.approx(
        expected, abs=2e-4
    )


def test_ar_has_its_exact_likelihood_under_every_value(shared):
    model, x_0 = golden_model(shared / "golden", "ar_text8")
    expected = load_golden(shared / "golden/lightning/ar_text8.expected.safetensors")["nlls"]
    for estimator in ("nelbo", "nelbo_exact", "any_order", "confidence"):
        found = -token_log_likelihood(model, x_0, estimator=estimator)
        total = expected[:, : x_0.shape[1] - 1].double().sum(dim=1)
        torch.testing.assert_close(found.sum(dim=1), total, rtol=1e-5, atol=1e-5)


def test_sedd_has_its_bound_alone(shared):
    model, x_0 = golden_model(shared / "golden", "sedd_text8")
    torch.manual_seed(0)
    found = score(model.losses, x_0, Estimator(num_draws=4))
    meta = load_golden(shared / "golden/lightning/sedd_text8.expected.safetensors").meta
    error = meta["nelbo_std_over_seeds"] / 2
    assert abs(nll(found, x_0) - meta["nelbo_mean"]) < 4 * error
    assert math.sqrt(found.variance.sum()) / x_0.numel() < 3 * error
    with pytest.raises(ValueError, match="eval.likelihood=any_order: allowed with sedd is nelbo"):
        token_log_likelihood(model, x_0, estimator="any_order")


def test_ar_in_rows_of_any_length(shared):
    """Shorter than a block, with a context, and with masks behind: the sum of the same terms."""
    model, x_0 = golden_model(shared / "golden", "ar_text8")
    expected = load_golden(shared / "golden/lightning/ar_text8.expected.safetensors")["nlls"]
    terms = expected[:3, 2:9].double().sum(dim=1)  # of tokens 3 to 9
    given = (torch.arange(10) < 3).expand(3, 10)
    short = token_log_likelihood(model, x_0[:3, :10], given=given)
    torch.testing.assert_close(-short[:, 0], terms, rtol=1e-5, atol=1e-5)
    masks = torch.full((3, 4), model.mask_index)
    longer = torch.cat((x_0[:3, :10], masks), dim=1)
    given = torch.cat((given, torch.zeros(3, 4, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(token_log_likelihood(model, longer, given=given), short)
