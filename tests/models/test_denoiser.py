"""Logits to probabilities and scores."""

import math

import pytest
import torch

from losses.objectives import masked_mean, score_entropy
from models.denoiser import log_expm1, sedd_log_score, subs_log_probs, token_log_probs
from models.kernels.chunked_head import TargetScores
from tests.helpers.references import (
    ALGOS,
    MASK,
    SIGMA_MAX,
    P,
    V,
    denoiser_of,
    generator,
    random_tokens,
)


class TestLogProbs:
    x_t = torch.tensor([[3, MASK, 0, MASK]])
    logits = 5 * torch.randn(1, 4, V, generator=generator())

    def test_subs_is_a_distribution_without_the_mask_token(self):
        p = subs_log_probs(self.logits, x_t=self.x_t, mask_index=MASK).exp()
        torch.testing.assert_close(p.sum(dim=-1), torch.ones(1, 4))
        assert (p[..., MASK] == 0).all()

    def test_subs_keeps_what_is_known(self):
        p = subs_log_probs(self.logits, x_t=self.x_t, mask_index=MASK).exp()
        for position, token in ((0, 3), (2, 0)):
            assert p[0, position, token] == 1

    def test_subs_predicts_masked_positions_by_softmax(self):
        found = subs_log_probs(self.logits, x_t=self.x_t, mask_index=MASK)[0, 1, :MASK]
        torch.testing.assert_close(found, self.logits[0, 1, :MASK].log_softmax(dim=-1))

    def test_ar_is_a_distribution_without_the_mask_token(self):
        log_p = token_log_probs(self.logits, mask_index=MASK)
        torch.testing.assert_close(log_p.exp().sum(dim=-1), torch.ones(1, 4))
        assert (log_p[..., MASK] < -1e5).all()
        expected = self.logits[..., :MASK].log_softmax(dim=-1)
        torch.testing.assert_close(log_p[..., :MASK], expected)

    @pytest.mark.parametrize("sigma", [1e-4, 0.7, SIGMA_MAX])
    def test_sedd_score(self, sigma):
        """logits - log(e^sigma - 1) - log(V - 1), and 0 (a ratio of one) at the observed token."""
        found = sedd_log_score(self.logits, x_t=self.x_t, sigma=torch.full((1, 1), sigma))
        expected = self.logits.double() - math.log(math.expm1(sigma)) - math.log(V - 1)
        for position, token in enumerate(self.x_t[0]):
            expected[0, position, token] = 0
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)

    def test_bf16_logits_are_normalised_in_float32(self):
        for log_p in (
            subs_log_probs(self.logits.bfloat16(), x_t=self.x_t, mask_index=MASK),
            token_log_probs(self.logits.bfloat16(), mask_index=MASK),
        ):
            assert log_p.dtype == torch.float32
            torch.testing.assert_close(log_p.exp().sum(dim=-1), torch.ones(1, 4))

    @ALGOS
    @torch.no_grad()
    def test_denoiser_reads_logits_by_its_parameterization(
        self, parameterization, pattern, time_conditioning
    ):
        denoiser = denoiser_of(parameterization, time_conditioning=time_conditioning)
        x_0 = random_tokens(3, 12)
        x_t = torch.where(random_tokens(3, 12, seed=1) % 2 == 0, MASK, x_0)
        x = torch.cat((x_t, x_0), dim=1) if pattern is P.BLOCK_DIFFUSION else x_t
        sigma = torch.tensor([0.2, 0.7, 3.0])
        logits = denoiser.logits(x, sigma, pattern=pattern)
        if parameterization == "subs":
            expected = subs_log_probs(logits, x_t=x_t, mask_index=MASK)
        else:
            expected = sedd_log_score(logits, x_t=x_t, sigma=sigma[:, None])
        assert torch.equal(denoiser(x, sigma, pattern=pattern), expected)

    @torch.no_grad()
    def test_without_time_conditioning_sigma_changes_nothing(self):
        x = random_tokens(2, 8)
        for conditioned in (False, True):
            denoiser = denoiser_of("subs", time_conditioning=conditioned)
            low, high = (
                denoiser.logits(x, torch.full((2,), sigma), pattern=P.FULL) for sigma in (0.1, 5)
            )
            assert torch.equal(low, high) is not conditioned


def entropy_by_loop(log_score: list[float], x_0: int, sigma: float) -> float:
    """The contract's formula at one masked position."""
    q = 1 / math.expm1(sigma)
    total = sum(math.exp(score) for y, score in enumerate(log_score) if y != MASK)
    # The contract's term is q * score[x_0], the log score.
    return total - q * log_score[x_0] + q * (math.log(q) - 1)


def scores_of(log_score: torch.Tensor, x_0: torch.Tensor, sigma: torch.Tensor) -> TargetScores:
    """What the network's head says where these (n, V) are the log scores."""
    logits = log_score + log_expm1(sigma)[:, None] + math.log(V - 1)
    logits[:, MASK] = -torch.inf
    return TargetScores(logits.gather(-1, x_0[:, None])[:, 0], logits.logsumexp(dim=-1))


class TestScoreEntropy:
    @pytest.mark.parametrize("sigma", [0.01, 0.7, SIGMA_MAX])
    def test_equals_a_loop(self, sigma):
        log_score = torch.randn(5, V, generator=generator(), dtype=torch.float64)
        x_0 = random_tokens(5)
        sigmas = torch.full((5,), sigma, dtype=torch.float64)
        scores = scores_of(log_score, x_0, sigmas)
        found = score_entropy(scores, sigma=sigmas, vocab_size=V)
        for i in range(5):
            expected = entropy_by_loop(log_score[i].tolist(), x_0[i].item(), sigma)
            assert math.isclose(found[i], expected, rel_tol=1e-9)

    def test_is_zero_at_the_true_ratios_and_positive_elsewhere(self):
        """The ratio at a mask is q for the token behind it, and zero for all others."""
        sigma = torch.tensor([0.7], dtype=torch.float64)
        q = 1 / torch.expm1(sigma)
        scores = torch.full((1, V), 1e-300, dtype=torch.float64)
        scores[0, 4] = q

        def entropy(scores: torch.Tensor) -> float:
            found = scores_of(scores.log(), torch.tensor([4]), sigma)
            return score_entropy(found, sigma=sigma, vocab_size=V).item()

        assert abs(entropy(scores)) < 1e-12
        for factor in (0.5, 2.0):
            other = scores.clone()
            other[0, 4] = factor * q
            assert entropy(other) > 0.1


def test_masked_mean_counts_the_mask():
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert masked_mean(losses, mask=mask).item() == 11.0


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("parameterization", ["subs", "ar", "sedd"])
@torch.no_grad()
def test_positions_may_be_a_mask_or_an_index(parameterization, is_fast):
    """Samplers know how many positions they ask for; a boolean has to be counted on a GPU."""
    denoise = denoiser_of(parameterization, block_size=4)
    denoise = denoise.for_sampling() if is_fast else denoise
    x = random_tokens(3, 8).masked_fill(torch.arange(8) % 3 == 1, MASK)
    sigma = torch.tensor([0.3, 0.6, 0.9]) if parameterization == "sedd" else None
    is_asked = (x == MASK) & torch.tensor([[True], [False], [True]])
    expected = denoise(x, sigma, pattern=P.FULL, at=is_asked)
    found = denoise(x, sigma, pattern=P.FULL, at=is_asked.nonzero(as_tuple=True))
    assert found.shape == (6, V) and torch.equal(found, expected)
