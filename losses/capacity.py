"""How many masks a draw of noise may have at most, so that shapes need not wait for their number.

The device alone knows how many tokens became masks. A loss that asks makes the CPU wait, several
times a batch, and has other shapes in every batch. So on a GPU there is room for a number of masks
that is known beforehand and that no draw exceeds.
"""

import functools
import math

import torch

from losses.forward_process import FULL, ClipInterval, count_log_weights, noise_values
from noise_schedule import Noise

# A draw has more masks with a probability below e^-50, or 2e-22.
_LOG_RISK = 50
# Times at which the expected number is computed.
_GRID = 1024
# Room comes in steps, which are also those of a GPU's matrix products.
_STEP = 128


def shapes_are_fixed(device: torch.device) -> bool:
    """Whether to make room for masks instead of counting them: a CPU waits for nobody but itself.

    There the spare places would cost time, and counting costs none.
    """
    return device.type != "cpu"


@functools.lru_cache(maxsize=256)
def most_masks(
    noise: Noise,
    interval: ClipInterval,
    *,
    rows: tuple[int, int],
    block_size: int,
    antithetic: bool,
    resample: bool,
    mdlm_loss_scale: bool,
) -> int:
    """A number of masks that a draw of noise for (B, N) tokens does not exceed.

    Let m(t) be the expected number of masks in a block of L at time t, which rises with t, and let
    n = B N / L be the number of blocks. The masks are the sum of three parts.

    - n times the mean of m over the interval: for `loglinear` (low + high) / 2 of all tokens. A sum
      of m at the right ends of a fine grid is never below it.
    - What the drawn times add. With antithetic times there is one in each of n equal strata, and
      m(t) is at most m at the right end of its stratum: all together m(high) - m(low) at most,
      one block, whatever n is; two blocks where the strata are moved on, and one of them lies at
      both ends. Independent times have a variance instead, n Var m(t).
    - What the masks of blocks at given times add: variance at most n max v, v(t) = L p (1 - p).

    Deviations are bounded by Bernstein's inequality: a sum of independent terms, none of which
    exceeds its mean by more than b, of variance V in all, exceeds its mean by c + sqrt(c^2 + 2 x V)
    or more, c = b x / 3, with probability e^-x at most. With x = 50 that is ten standard
    deviations and a bit. Terms are the single tokens (b = 1), and whole blocks (b = the highest
    number of masks less the lowest) where tokens of a block depend on each other: with independent
    times and with `resample`, where m and v are those of the truncated binomial.

    Args:
        noise, interval, mdlm_loss_scale: see `forward_process.noise_values`.
        rows: (B, N).
        block_size: L.
        antithetic: see `forward_process.sample_t`.
        resample: whether counts outside of the interval are drawn again, see `q_xt_within`.

    Returns:
        At most B N, and below that a multiple of 128.
    """
    num_tokens = rows[0] * rows[1]
    num_blocks = num_tokens // block_size
    is_resampled = resample and interval != FULL
    counts = interval.mask_counts(block_size) if is_resampled else range(block_size + 1)
    mean, variance = _counts_over_time(
        noise, interval, counts=counts, block_size=block_size, mdlm_loss_scale=mdlm_loss_scale
    )
    of_times = 0.0 if antithetic else mean.var(correction=0).item()
    of_strata = 2 * (mean[-1] - mean[0]).item() if antithetic else 0.0
    total_variance = num_blocks * (variance.max().item() + of_times)
    largest = len(counts) - 1 if is_resampled or not antithetic else 1
    c = largest * _LOG_RISK / 3
    deviation = c + math.sqrt(c**2 + 2 * _LOG_RISK * total_variance)
    most = num_blocks * mean[1:].mean().item() + of_strata + deviation
    most = min(most, num_blocks * (counts.stop - 1))
    return min(math.ceil(most / _STEP) * _STEP, num_tokens)


def _counts_over_time(
    noise: Noise,
    interval: ClipInterval,
    *,
    counts: range,
    block_size: int,
    mdlm_loss_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the number of masks in a block at times from low to high, float64."""
    t = torch.linspace(interval.low, interval.high, _GRID + 1, dtype=torch.float64, device="cpu")
    p = noise_values(noise, t, interval=interval, mdlm_loss_scale=mdlm_loss_scale).move_chance
    if counts == range(block_size + 1):
        return block_size * p, block_size * p * (1 - p)
    weights = count_log_weights(p, counts=counts, block_size=block_size).softmax(dim=-1)
    count = torch.arange(counts.start, counts.stop, dtype=torch.float64, device="cpu")
    mean = weights @ count
    return mean, weights @ count**2 - mean**2
