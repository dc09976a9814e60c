"""The forward process: times t per block, and which tokens are masked at those times."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from noise_schedule import EPS, Noise, NoiseValues

# Float32 buffers carry the range through checkpoints; six decimals bring the same number back.
DECIMALS = 6


@dataclass(frozen=True)
class ClipInterval:
    """The range [low, high] that t is drawn from (paper section 5.2, "clipped schedules").

    Bounds are rounded to six decimals, so that a range read back from a float32 buffer is the same
    range: training and the search for it treat it alike.

    Raises:
        ValueError: unless 0 < low <= high <= 1.
    """

    low: float
    high: float

    def __post_init__(self):
        object.__setattr__(self, "low", round(float(self.low), DECIMALS))
        object.__setattr__(self, "high", round(float(self.high), DECIMALS))
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(
                f"training.sampling_eps_min={self.low}, training.sampling_eps_max={self.high}: "
                "must satisfy 0 < min <= max <= 1"
            )

    @property
    def is_unweighted(self) -> bool:
        """Above one half every masked token counts the same (weight -1 instead of -1/t)."""
        return self.low > 0.5

    def mask_counts(self, block_size: int) -> range:
        """How many of a block's L tokens may be masked when blocks outside the range are redrawn.

        A bound that the full range has too does not bind. Empty where no count / L lies inside.
        """
        low, high = 0, block_size
        if self.low != FULL.low:
            low = math.ceil(self.low * block_size - EPS / 2)
        if self.high != FULL.high:
            high = math.floor(self.high * block_size + EPS / 2)
        return range(low, high + 1)


FULL = ClipInterval(EPS, 1.0)  # the whole NELBO
NLL = ClipInterval(1.0, 1.0)  # everything masked: at L = 1 the exact likelihood


def sample_t(
    shape: tuple[int, int],
    *,
    interval: ClipInterval,
    antithetic: bool,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One time per block, uniform on the interval.

    Args:
        shape: (B, K), rows and blocks per row.
        interval: the range of t.
        antithetic: spread the B K times evenly, one in each of B K equal strata (low discrepancy).
        device: of the result.
        generator: on that device.

    Returns:
        t, (B, K) float32.
    """
    t = torch.rand(shape, device=device, generator=generator)
    if antithetic:
        strata = torch.arange(t.numel(), device=device).view(shape)
        t = (t / t.numel() + strata / t.numel()) % 1
    return interval.low + (interval.high - interval.low) * t


def spread_over_draws(t: Tensor, *, num_draws: int, interval: ClipInterval) -> Tensor:
    """Several times for each block, spread evenly over the interval.

    From draw to draw a time moves on by 1 / D of the interval, and comes in again at its low end.
    So the D times of a block lie in D equal strata, and times that lie in equal strata over the
    blocks still do in every draw.

    Args:
        t: (B, K), as `sample_t` draws it.
        num_draws: D.
        interval: that t was drawn from.

    Returns:
        (D, B, K); the first are t.
    """
    width = interval.high - interval.low
    steps = torch.arange(num_draws, device=t.device, dtype=t.dtype)[:, None, None] / num_draws
    moved = t + width * steps
    return torch.where(moved > interval.high, moved - width, moved)


def noise_values(
    noise: Noise, t: Tensor, *, interval: ClipInterval, mdlm_loss_scale: bool
) -> NoiseValues:
    """Weight and masking probability at t, with the two conventions that differ from the schedule.

    Args:
        noise: the schedule.
        t: times, any shape.
        interval: the range t was drawn from; above one half the loss is unweighted.
        mdlm_loss_scale: the MDLM and SEDD papers' form: with sigma the total noise,
            p = 1 - e^-sigma and the weight is -sigma' / (e^sigma - 1).
    """
    if mdlm_loss_scale:
        sigma = noise.total_noise(t)
        values = NoiseValues(-noise.rate_noise(t) / torch.expm1(sigma), -torch.expm1(-sigma))
    else:
        values = noise(t)
    if interval.is_unweighted:
        return NoiseValues(-torch.ones_like(values.loss_scaling), values.move_chance)
    return values


def q_xt(
    x_0: Tensor, *, u: Tensor, move_chance: Tensor, mask_index: int, ignore_bos: bool
) -> Tensor:
    """x_t: the tokens with u <= p become masks.

    Args:
        x_0: clean tokens (B, N).
        u: uniforms on [0, 1), (B, N).
        move_chance: p, broadcastable to (B, N).
        mask_index: id of the mask token.
        ignore_bos: position 0 stays clean.

    Returns:
        (B, N), int64.
    """
    return _mask(x_0, u <= move_chance, mask_index=mask_index, ignore_bos=ignore_bos)


def q_xt_within(
    x_0: Tensor,
    *,
    move_chance: Tensor,
    interval: ClipInterval,
    block_size: int,
    mask_index: int,
    ignore_bos: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_t given that every block's masked fraction lies in the interval.

    Redrawing a block until it fits leaves a number of masks that is binomial (L, p) truncated to
    the counts that fit, at positions that are uniform given the number. That is what is drawn
    here, at once: no loop, no wait for the device, and an end even where fitting draws are rare.

    Args:
        x_0: clean tokens (B, N), N = K L.
        move_chance: p of each block, (B, K).
        interval, block_size: which counts of masks per block are allowed.
        mask_index, ignore_bos: as in `q_xt`; position 0 is counted, then made clean.
        generator: on the device of x_0.

    Raises:
        ValueError: if no count of masks fits.
    """
    counts = interval.mask_counts(block_size)
    if not counts:
        raise ValueError(
            f"training.resample=true: no number of masks out of block_size={block_size} is a "
            f"fraction within [{interval.low}, {interval.high}]; "
            "widen training.sampling_eps_min/max"
        )
    log_weight = count_log_weights(move_chance, counts=counts, block_size=block_size)
    # argmax of log weight + Gumbel noise is a draw in proportion to the weights.
    exponential = torch.empty_like(log_weight).exponential_(generator=generator)
    num_masked = (log_weight - exponential.log()).argmax(dim=-1) + counts.start  # (B, K)

    u = torch.rand(x_0.shape, device=x_0.device, generator=generator)
    rank = u.unflatten(1, (-1, block_size)).argsort(dim=-1).argsort(dim=-1)  # (B, K, L)
    is_masked = (rank < num_masked[..., None]).flatten(1)
    return _mask(x_0, is_masked, mask_index=mask_index, ignore_bos=ignore_bos)


def count_log_weights(move_chance: Tensor, *, counts: range, block_size: int) -> Tensor:
    """log of the binomial probability of each number of masks in a block of L, for p of any shape.

    Returns:
        (..., number of counts); over fewer than all counts they do not sum to one.
    """
    p = move_chance[..., None]
    count = torch.arange(counts.start, counts.stop, device=p.device, dtype=p.dtype)
    size = count.new_full((), block_size)  # unlike a number from the CPU it waits for nothing
    log_choose = size.add(1).lgamma() - count.add(1).lgamma() - (size - count).add(1).lgamma()
    return log_choose + torch.xlogy(count, p) + torch.xlogy(size - count, 1 - p)


def _mask(x_0: Tensor, is_masked: Tensor, *, mask_index: int, ignore_bos: bool) -> Tensor:
    if ignore_bos:
        is_masked = is_masked.clone()
        is_masked[:, 0].fill_(False)
    return torch.where(is_masked, mask_index, x_0)
