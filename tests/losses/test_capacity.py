"""Room for masks: no draw exceeds it, little is to spare, and losses are the same with it."""

import dataclasses

import pytest
import torch

from losses import token_losses
from losses.capacity import most_masks, shapes_are_fixed
from losses.forward_process import FULL, NLL, ClipInterval
from losses.objectives import diffusion_token_losses, masked_mean, masked_positions
from losses.token_losses import TokenLosses
from models.masks import AttentionPattern
from noise_schedule import SCHEDULES, get_noise
from tests.helpers.references import ALGOS, MASK, SIGMA_MAX, denoiser_of, generator, random_tokens

RANGES = [FULL, ClipInterval(0.3, 0.8), ClipInterval(0.45, 0.95)]


def losses_of(parameterization: str = "subs", **settings) -> TokenLosses:
    shared = {"noise": get_noise("loglinear"), "pattern": AttentionPattern.FULL, "block_size": 4}
    return TokenLosses(denoiser=denoiser_of(parameterization), **(shared | settings))


def counts(losses: TokenLosses, interval: ClipInterval, rows: tuple[int, int]) -> torch.Tensor:
    """Numbers of masks in 25 draws."""
    x_0, g = torch.zeros(rows, dtype=torch.int64), generator(4)
    draws = (losses._add_noise(x_0, interval=interval, generator=g)[0] for _ in range(25))
    return torch.stack([(x_t == MASK).sum() for x_t in draws]).double()


@pytest.mark.parametrize("interval", RANGES)
@pytest.mark.parametrize("noise", SCHEDULES)
@pytest.mark.parametrize("drawn", ["antithetic", "independent", "resample"])
def test_draws_stay_ten_deviations_below_it(interval, noise, drawn):
    losses = losses_of(
        noise=get_noise(noise), antithetic=drawn != "independent", resample=drawn == "resample",
        mdlm_loss_scale=noise == "cosine", ignore_bos=False,
    )  # fmt: skip
    rows = (32, 128)
    most, found = losses._capacity(rows, interval), counts(losses, interval, rows)
    assert found.mean() + 10 * found.std() < most <= 32 * 128
    spare = {"antithetic": 0.12, "independent": 0.2, "resample": 0.16}[drawn]
    assert most - found.mean() < spare * 32 * 128, "and it is worth having"


def test_of_a_training_of_the_paper_it_spares_few_percent():
    """Batch 32, N 1,024, L 16: half of the tokens are masks, and 53 % have room."""
    shared = {"rows": (32, 1024), "block_size": 16, "mdlm_loss_scale": False}
    drawn = {"antithetic": True, "resample": False}
    assert most_masks(get_noise("loglinear"), FULL, **shared, **drawn) == 17408
    assert most_masks(get_noise("loglinear"), NLL, **shared, **drawn) == 32 * 1024


def test_never_more_than_there_are_tokens():
    losses = losses_of(antithetic=False, block_size=16)
    assert losses._capacity((2, 16), FULL) == 32


def test_of_resampled_blocks_the_highest_number_is_a_bound():
    losses = losses_of(resample=True)
    assert losses._capacity((64, 16), ClipInterval(0.25, 0.5)) == 64 * 16 // 2


def test_positions_are_masks_first_and_none_comes_twice():
    masked = torch.rand(3, 7, generator=generator()) < 0.5
    exact = masked_positions(masked, capacity=None)
    filled = masked_positions(masked, capacity=18)
    assert exact.tolist() == masked.flatten().nonzero()[:, 0].tolist()
    assert filled[: len(exact)].tolist() == exact.tolist()
    assert len(filled) == 18 == len(set(filled.tolist()))


@ALGOS
def test_losses_and_gradients_are_those_of_exact_counting(
    parameterization, pattern, time_conditioning, monkeypatch
):
    denoiser = denoiser_of(parameterization, time_conditioning=time_conditioning)
    losses = dataclasses.replace(losses_of(), denoiser=denoiser, pattern=pattern)
    x_0, found = random_tokens(3, 12), []
    intervals = [FULL, ClipInterval(0.3, 0.8), ClipInterval(0.5, 1.0)]
    for is_fixed in (False, True):
        monkeypatch.setattr(token_losses, "shapes_are_fixed", lambda _device, on=is_fixed: on)
        denoiser.backbone.zero_grad()
        of_one = losses(x_0, generator=generator(2))
        masked_mean(of_one, mask=torch.ones_like(of_one)).backward()
        gradients = [p.grad for p in denoiser.backbone.parameters() if p.grad is not None]
        torch.manual_seed(3)
        with torch.no_grad():
            of_all = losses.on_all(x_0, intervals)
        found.append([of_one, *gradients, *of_all.values()])
    for exact, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, exact, rtol=1e-4, atol=1e-5)


def test_too_many_masks_cannot_be_missed():
    """They have no place: the loss is NaN on the device, which `NanGuard` ends a training for."""
    denoiser, x_0 = denoiser_of("subs"), random_tokens(2, 8)
    x_t = torch.full_like(x_0, MASK)
    values = get_noise("loglinear")(torch.full((2, 1), 0.9))

    def mean(capacity: int) -> torch.Tensor:
        losses = diffusion_token_losses(
            denoiser, x_0, x_t=x_t, values=values, sigma_max=SIGMA_MAX,
            pattern=AttentionPattern.FULL, capacity=capacity,
        )  # fmt: skip
        return masked_mean(losses, mask=torch.ones_like(losses))

    assert mean(16).isfinite()
    assert mean(15).isnan()


def test_a_cpu_counts():
    assert not shapes_are_fixed(torch.device("cpu"))
    assert shapes_are_fixed(torch.device("cuda", 1))
