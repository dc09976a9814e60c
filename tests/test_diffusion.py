"""The parts of the Lightning module: losses, noise, denominators, the clipped range."""

import copy

import pytest
import torch

from diffusion import TRAIN_STREAM, VALIDATION_STREAM, Diffusion
from likelihood.estimators import Estimator
from likelihood.scoring import token_log_likelihood
from losses.clipped_schedule import MAX_BATCHES
from losses.forward_process import FULL, NLL, ClipInterval
from tests.helpers.small_module import batches, module
from tests.helpers.small_run import ALGOS

BD3LM = ALGOS["bd3lm"]


@pytest.fixture
def build(compose, tmp_path):
    """Builds a small module: `build("algo=ar", ...)`."""
    return lambda *changes: module(compose, tmp_path, *changes)


@pytest.mark.parametrize("algo", ALGOS)
def test_range_buffers_exist_only_with_var_min(algo, build):
    names = set(build(*ALGOS[algo]).state_dict())
    buffers = {"sampling_eps_min", "sampling_eps_max"}
    assert names & buffers == (buffers if algo == "bd3lm" else set())
    assert all(name.startswith("backbone.") for name in names - buffers)


def test_bd3lm_without_var_min_has_no_buffers(build):
    model = build(*BD3LM, "algo.var_min=false", "training.sampling_eps_min=0.3")
    assert "sampling_eps_min" not in model.state_dict() and model.clip_search is None
    assert model.interval == ClipInterval(0.3, 1.0), "the range of the config is still trained on"


def test_training_and_search_read_the_same_range(build):
    """1e-3 in a float32 buffer is not 1e-3: training resampled differently from the search."""
    model = build(*BD3LM)
    tensors = copy.deepcopy(model.state_dict())
    assert tensors["sampling_eps_min"].dtype == torch.float32
    model.set_interval(ClipInterval(0.5, 1.0))
    model.load_state_dict(tensors)
    assert model.interval == FULL == model.clip_search.intervals[0]
    assert model.interval.low == 1e-3


@pytest.mark.parametrize(
    ("algo", "is_training", "expected"),
    [
        ("ar", True, [[1, 1, 0]]),
        ("ar", False, [[1, 1, 0]]),
        ("mdlm", True, [[1, 1, 1, 0]]),
        ("mdlm", False, [[0, 1, 1, 0]]),
        ("bd3lm", True, [[1, 1, 1, 0]]),
        ("sedd", False, [[0, 1, 1, 0]]),
    ],
)
def test_denominators(algo, is_training, expected, build):
    """Position 0 counts in training and not in evaluation: published numbers depend on it."""
    attention_mask = torch.tensor([[1, 1, 1, 0]])
    found = build(*ALGOS[algo]).loss_mask(attention_mask, is_training=is_training)
    assert found.tolist() == expected
    assert attention_mask.tolist() == [[1, 1, 1, 0]], "the batch is not changed"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["block_size=1"], NLL),
        (["block_size=1", "algo.var_min=false"], NLL),
        (["block_size=1", "training.eval_nll=false"], FULL),
        (["block_size=2"], FULL),
    ],
)
def test_single_tokens_report_the_exact_likelihood_if_asked(changes, expected, build):
    """L = 1 with var_min off reported the bound under the name of the likelihood."""
    assert build("algo=bd3lm", *changes).validation_interval == expected


def test_exact_likelihood_of_single_tokens(build):
    """All masked: minus log p of each token given the clean ones before it, without any noise."""
    model = build("algo=bd3lm", "block_size=1").eval()
    x_0 = next(iter(batches(1)))["input_ids"]
    with torch.no_grad():
        one, two = (model.token_losses(x_0, interval=NLL) for _ in range(2))
        x_t = torch.full_like(x_0, model.mask_index)
        x_t[:, 0] = x_0[:, 0]
        log_p = model.denoiser(torch.cat((x_t, x_0), dim=1), pattern=model.pattern)
    assert torch.equal(one, two), "nothing is random"
    expected = -log_p.gather(-1, x_0[..., None]).squeeze(-1)
    torch.testing.assert_close(one[:, 1:], expected[:, 1:])
    assert (one[:, 0] == 0).all()


def test_noise_differs_between_ranks_and_repeats(build, monkeypatch):
    """All ranks shared one seed: the same noise and dropout on every GPU."""
    model = build(*BD3LM)
    x_0 = next(iter(batches(1)))["input_ids"]

    def losses(rank: int, stream: int, number: int):
        monkeypatch.setattr(Diffusion, "global_rank", rank)
        model._seed(stream, number)
        with torch.no_grad():
            return model.token_losses(x_0, interval=FULL)

    first = losses(0, TRAIN_STREAM, 3)
    assert torch.equal(first, losses(0, TRAIN_STREAM, 3))
    others = [(1, TRAIN_STREAM, 3), (0, TRAIN_STREAM, 4), (0, VALIDATION_STREAM, 3)]
    for other in others:
        assert not torch.equal(first, losses(*other)), other


@pytest.mark.parametrize("block_size", [1, 4, 16])
@torch.no_grad()
def test_ranges_together_equal_one_after_the_other(build, block_size):
    """The clean half is seen once, and several ranges share a pass: the losses are the same."""
    model = build(*BD3LM, f"block_size={block_size}", "training.resample=true").eval()
    (batch,) = batches(1)
    x_0 = batch["input_ids"]
    torch.manual_seed(1)
    found = model._validation_losses(x_0, batch_idx=0)
    torch.manual_seed(1)
    expected = {interval: model.token_losses(x_0, interval=interval) for interval in found}
    assert set(found) >= set(model.clip_search.intervals)
    assert any(losses.any() for losses in expected.values())
    for interval, losses in expected.items():
        torch.testing.assert_close(found[interval], losses, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_no_search_after_enough_batches(build):
    model = build(*BD3LM).eval()
    (batch,) = batches(1)
    found = model._validation_losses(batch["input_ids"], batch_idx=MAX_BATCHES)
    assert list(found) == [model.validation_interval]


# --- evaluations ---------------------------------------------------------------------------------


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, of 16 tokens and of 6, and their masks."""
    x_0 = next(iter(batches(1, batch_size=2)))["input_ids"]
    mask = torch.ones_like(x_0)
    mask[1, 6:] = 0
    return x_0, mask


@pytest.mark.parametrize("estimator", ["any_order", "confidence"])
def test_texts_of_different_lengths_count_by_token(estimator, build):
    """Padding is behind the end of a text for a sampler, whatever its ids are."""
    model = build(*BD3LM).eval()
    model.estimator = Estimator(likelihood=estimator)
    x_0, mask = padded_batch()
    mask = model.loss_mask(mask, is_training=False)
    losses, _ = model._estimated_losses(x_0, mask)
    total = (losses * mask).sum(dim=1)
    alone = [
        -token_log_likelihood(model, text[None], estimator=estimator).sum()
        for text in (x_0[0], x_0[1, :6])
    ]
    torch.testing.assert_close(total, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_the_exact_bound_is_the_mean_of_the_drawn_one_with_padding_too(build):
    """There padding takes part in the noise, as in training, and does not count."""
    model = build(*BD3LM).eval()
    x_0, mask = padded_batch()
    mask = model.loss_mask(mask, is_training=False)
    found = []
    for estimator in (Estimator(likelihood="nelbo_exact"), Estimator(num_draws=300)):
        torch.manual_seed(0)
        model.estimator = estimator
        losses, variance = model._estimated_losses(x_0, mask)
        found.append((losses * mask).sum())
    assert variance.shape == (2,)
    assert abs(found[0] - found[1]) < 3 * variance.sum().sqrt()
    assert variance.sum().sqrt() < 0.1 * found[0]
