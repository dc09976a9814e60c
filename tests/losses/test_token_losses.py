"""The NELBO's terms, the exact likelihood and the autoregressive loss, against plain twins."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from losses.forward_process import FULL, NLL, ClipInterval, noise_values, q_xt
from losses.objectives import ar_token_losses, diffusion_token_losses, masked_mean
from losses.token_losses import TokenLosses
from models.denoiser import Denoiser
from noise_schedule import NoiseValues, get_noise
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


def noisy(t: Tensor, *, batch: int = 3, length: int = 12) -> tuple[Tensor, Tensor, NoiseValues]:
    """x_0, x_t and the values at times t, broadcastable to (batch, length)."""
    x_0 = random_tokens(batch, length)
    values = noise_values(get_noise("loglinear"), t, interval=FULL, mdlm_loss_scale=False)
    u = torch.rand(batch, length, generator=generator(5))
    x_t = q_xt(x_0, u=u, move_chance=values.move_chance, mask_index=MASK, ignore_bos=True)
    return x_0, x_t, values


def losses_of(denoiser: Denoiser, x_0, x_t, values, pattern) -> Tensor:
    return diffusion_token_losses(
        denoiser, x_0, x_t=x_t, values=values, sigma_max=SIGMA_MAX, pattern=pattern
    )


def slow_losses(denoiser: Denoiser, x_0, x_t, values, pattern) -> Tensor:
    """The plain twin: probabilities of all tokens at all positions, in float64, then the terms."""
    is_block_diffusion = pattern is P.BLOCK_DIFFUSION
    x = torch.cat((x_t, x_0), dim=1) if is_block_diffusion else x_t
    p = values.move_chance.expand_as(x_0).double()
    scaling = values.loss_scaling.expand_as(x_0).double()
    sigma = (-torch.log1p(-p)).clamp(max=SIGMA_MAX)
    logits = denoiser.logits(x, sigma[:, 0].float(), pattern=pattern).double()
    if denoiser.parameterization == "subs":
        logits[..., MASK] = -1e6
        log_p = logits.log_softmax(dim=-1).gather(-1, x_0[..., None])[..., 0]
        return torch.where(x_t == MASK, scaling * log_p, 0.0)
    log_score = logits - torch.expm1(sigma).log()[..., None] - math.log(V - 1)
    log_score = log_score.scatter(-1, x_t[..., None], 0.0)
    q = 1 / torch.expm1(sigma)
    entropy = (
        log_score.exp().sum(dim=-1)
        - log_score[..., MASK].exp()
        - q * log_score.gather(-1, x_0[..., None])[..., 0]
        + q * (q.log() - 1)
    )
    return torch.where(x_t == MASK, -scaling * torch.expm1(sigma) * entropy, 0.0)


def gradients(denoiser: Denoiser, losses: Tensor) -> list[Tensor]:
    denoiser.backbone.zero_grad()
    masked_mean(losses, mask=torch.ones_like(losses)).backward()
    return [p.grad.double() for p in denoiser.backbone.parameters() if p.grad is not None]


class TestTokenLosses:
    @ALGOS
    def test_gathered_logits_equal_the_full_twin(
        self, parameterization, pattern, time_conditioning
    ):
        """Only masked positions pass through the output head; values and gradients are the same.

        The original computed the 50k-way head for all 2N positions.
        """
        denoiser = denoiser_of(parameterization, time_conditioning=time_conditioning)
        batch = noisy(torch.tensor([[0.2], [0.6], [0.95]]))
        fast = losses_of(denoiser, *batch, pattern)
        slow = slow_losses(denoiser, *batch, pattern)
        torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
        fast_gradients, slow_gradients = gradients(denoiser, fast), gradients(denoiser, slow)
        assert len(fast_gradients) == len(slow_gradients)
        for found, expected in zip(fast_gradients, slow_gradients, strict=True):
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7

    @ALGOS
    def test_no_loss_where_nothing_is_masked(self, parameterization, pattern, time_conditioning):
        """A block, or a whole small batch, may come out without a mask: zero, and not NaN."""
        denoiser = denoiser_of(parameterization, time_conditioning=time_conditioning)
        x_0, _, values = noisy(torch.full((3, 12), 1e-3))
        losses = losses_of(denoiser, x_0, x_0, values, pattern)
        assert torch.equal(losses, torch.zeros(3, 12))
        masked_mean(losses, mask=torch.ones(3, 12)).backward()
        for parameter in denoiser.backbone.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()

    @ALGOS
    @torch.no_grad()
    def test_losses_are_zero_exactly_at_visible_tokens(
        self, parameterization, pattern, time_conditioning
    ):
        denoiser = denoiser_of(parameterization, time_conditioning=time_conditioning)
        x_0, x_t, values = noisy(torch.tensor([[0.5]]).expand(3, 1))
        losses = losses_of(denoiser, x_0, x_t, values, pattern)
        assert torch.equal(losses != 0, x_t == MASK)
        assert (losses[x_t == MASK] > 0).all()

    @torch.no_grad()
    def test_time_of_one_block_weighs_that_block_alone(self):
        """Every block has its own t (paper, section 3.2): a row is no single noise level."""
        denoiser = denoiser_of("subs")
        x_0, x_t, _ = noisy(torch.tensor([[0.5]]))
        noise, t = get_noise("loglinear"), torch.full((3, 12), 0.5)
        plain = losses_of(denoiser, x_0, x_t, noise(t), P.BLOCK_DIFFUSION)
        t[:, 4:8] = 0.25
        changed = losses_of(denoiser, x_0, x_t, noise(t), P.BLOCK_DIFFUSION)
        assert torch.equal(plain[:, :4], changed[:, :4])
        assert torch.equal(plain[:, 8:], changed[:, 8:])
        torch.testing.assert_close(changed[:, 4:8], 2 * plain[:, 4:8])
        assert plain[:, 4:8].any()

    @torch.no_grad()
    def test_each_block_is_conditioned_on_its_own_sigma(self):
        """The original told every block the first block's sigma, where time is conditioned on."""
        denoiser = denoiser_of("subs", time_conditioning=True)
        x_0, x_t, _ = noisy(torch.tensor([[0.5]]))
        unweighted = torch.full((3, 12), -1.0)

        def losses(*p: float) -> Tensor:
            values = NoiseValues(unweighted, torch.tensor(p).repeat_interleave(4).expand(3, 12))
            return losses_of(denoiser, x_0, x_t, values, P.BLOCK_DIFFUSION)

        plain, other = losses(0.3, 0.3, 0.3), losses(0.3, 0.9, 0.3)
        at = torch.zeros(12, dtype=torch.bool)
        at[4:8] = True
        torch.testing.assert_close(plain[:, ~at], other[:, ~at], rtol=0, atol=1e-5)
        assert (plain[:, at] - other[:, at]).abs().max() > 1e-2
        torch.testing.assert_close(other[:, at], losses(0.9, 0.9, 0.9)[:, at], rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_sigma_is_bounded_where_everything_is_masked(self):
        """-log(1 - p) is infinite at p = 1; the network has never been told more than sigma(1)."""
        denoiser = denoiser_of("sedd", time_conditioning=True)
        x_0, x_t, values = noisy(torch.ones(3, 1))
        losses = losses_of(denoiser, x_0, x_t, values, P.FULL)
        assert losses.isfinite().all() and (losses[:, 1:] > 0).all()

    def test_bf16_logits_give_float32_losses(self):
        denoiser = denoiser_of("subs")
        batch = noisy(torch.tensor([[0.5]]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = losses_of(denoiser, *batch, P.BLOCK_DIFFUSION)
        assert found.dtype == torch.float32
        expected = losses_of(denoiser, *batch, P.BLOCK_DIFFUSION)
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("parameterization", ["subs", "sedd"])
def test_one_block_leaves_the_clean_half_out(parameterization, time_conditioning, monkeypatch):
    """At L = N: the loss and the gradients of [x_t ; x_0], by a pass over x_t alone."""
    denoiser = denoiser_of(
        parameterization, time_conditioning=time_conditioning, block_size=12, attn_backend="sdpa"
    )
    token_losses = TokenLosses(
        denoiser=denoiser, noise=get_noise("loglinear"), pattern=P.BLOCK_DIFFUSION, block_size=12
    )
    x_0 = random_tokens(3, 12)
    x_t, values, _ = token_losses._add_noise(x_0, interval=FULL, generator=generator(2))
    expected = losses_of(denoiser, x_0, x_t, values, P.BLOCK_DIFFUSION)
    expected_gradients = gradients(denoiser, expected)

    widths, embed = [], denoiser.backbone.vocab_embed.forward
    monkeypatch.setattr(
        denoiser.backbone.vocab_embed, "forward", lambda x: widths.append(x.shape[1]) or embed(x)
    )
    found = token_losses(x_0, generator=generator(2))
    assert widths == [12] and found.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(denoiser, found), expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parameterization", ["subs", "sedd", "ar"])
@torch.no_grad()
def test_a_smaller_batch_has_the_shapes_of_a_full_one(parameterization, monkeypatch):
    """On a GPU the last batch of a validation was compiled for again; its losses are the same."""
    is_ar = parameterization == "ar"
    denoiser = denoiser_of(
        parameterization, time_conditioning=parameterization == "sedd", adaln=not is_ar
    )
    plain = TokenLosses(
        denoiser=denoiser, noise=get_noise("loglinear"), pattern=P.BLOCK_DIFFUSION, block_size=4
    )
    padded = dataclasses.replace(plain, min_rows=5)
    intervals = [ClipInterval(i / 10, 0.9) for i in range(1, 2 if is_ar else 7)]
    shapes, embed = [], denoiser.backbone.vocab_embed.forward
    monkeypatch.setattr(
        denoiser.backbone.vocab_embed, "forward", lambda x: shapes.append(x.shape) or embed(x)
    )

    def everything(losses: TokenLosses, x_0: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        return [losses(x_0), *losses.on_all(x_0, intervals).values(), torch.rand(3)]

    everything(padded, random_tokens(5, 12))
    full, rows = shapes.copy(), random_tokens(3, 12)
    shapes.clear()
    found = everything(padded, rows)
    assert shapes == full
    expected = everything(plain, rows)
    assert torch.equal(found[-1], expected[-1]), "no other noise is drawn"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    shapes.clear()
    with torch.enable_grad():
        padded(rows)
    assert shapes[0][0] == 3, "a training's batches are full, and their number is tried out"


class TestExactLikelihood:
    """L = 1: with every token masked each prediction sees exactly the text before it."""

    length = 8

    def losses(self, *, ignore_bos: bool) -> tuple[Denoiser, Tensor, Tensor]:
        denoiser = denoiser_of("subs", block_size=1)
        x_0 = random_tokens(2, self.length)
        values = noise_values(
            get_noise("loglinear"), torch.ones(2, self.length), interval=NLL, mdlm_loss_scale=False
        )
        u = torch.rand(x_0.shape, generator=generator())
        x_t = q_xt(x_0, u=u, move_chance=values.move_chance, mask_index=MASK, ignore_bos=ignore_bos)
        return denoiser, x_0, losses_of(denoiser, x_0, x_t, values, P.BLOCK_DIFFUSION)

    @torch.no_grad()
    def test_equals_minus_log_p_of_the_all_masked_pass(self):
        denoiser, x_0, losses = self.losses(ignore_bos=False)
        x = torch.cat((torch.full_like(x_0, MASK), x_0), dim=1)
        log_p = denoiser(x, pattern=P.BLOCK_DIFFUSION).gather(-1, x_0[..., None])[..., 0]
        torch.testing.assert_close(losses, -log_p, rtol=1e-5, atol=1e-6)

    @torch.no_grad()
    def test_is_the_autoregressive_factorisation(self):
        """Token by token, from the text before it and one mask: log p(x_i | x_<i)."""
        denoiser, x_0, losses = self.losses(ignore_bos=False)
        for i in range(self.length):
            x = torch.cat((x_0[:, :i], torch.full((2, 1), MASK)), dim=1)
            log_p = denoiser(x, pattern=P.BLOCK_CAUSAL)[:, i].gather(-1, x_0[:, i : i + 1])[:, 0]
            torch.testing.assert_close(losses[:, i], -log_p, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_has_as_many_terms_as_ar(self):
        """With position 0 clean, N - 1 terms; evaluation divides by them, training by N.

        The terms of ar are the N - 1 tokens after the first, so both report the same quantity.
        """
        denoiser, x_0, losses = self.losses(ignore_bos=True)
        assert (losses[:, 1:] > 0).all() and not losses[:, 0].any()
        ar = ar_token_losses(denoiser_of("ar", adaln=False), x_0)
        assert (losses > 0).sum() == ar.numel()
        everything = torch.ones_like(losses)
        evaluated = everything.clone()
        evaluated[:, 0] = 0
        mean = losses[:, 1:].mean()
        torch.testing.assert_close(masked_mean(losses, mask=evaluated), mean)
        in_training = masked_mean(losses, mask=everything)
        torch.testing.assert_close(in_training, mean * (self.length - 1) / self.length)


class TestAutoregressive:
    def test_equals_the_full_twin(self):
        denoiser = denoiser_of("ar", adaln=False)
        x_0 = random_tokens(3, 12)
        fast = ar_token_losses(denoiser, x_0)
        logits = denoiser.logits(x_0[:, :-1], pattern=P.CAUSAL).double()
        logits[..., MASK] = -1e6
        slow = -logits.log_softmax(dim=-1).gather(-1, x_0[:, 1:, None])[..., 0]
        assert fast.shape == (3, 11)
        torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
        for found, expected in zip(
            gradients(denoiser, fast), gradients(denoiser, slow), strict=True
        ):
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7

    @torch.no_grad()
    def test_equals_prediction_from_each_prefix(self):
        denoiser = denoiser_of("ar", adaln=False)
        x_0 = random_tokens(2, 6)
        losses = ar_token_losses(denoiser, x_0)
        for i in range(1, 6):
            log_p = denoiser(x_0[:, :i], pattern=P.CAUSAL)[:, -1].gather(-1, x_0[:, i : i + 1])
            torch.testing.assert_close(losses[:, i - 1], -log_p[:, 0], rtol=1e-5, atol=1e-5)
