"""Times, ranges and plain masking. (Masking within a range: test_forward_process_resampling.py.)"""

import math

import pytest
import torch

from losses.forward_process import (
    FULL,
    NLL,
    ClipInterval,
    q_xt,
    sample_t,
    spread_over_draws,
)
from noise_schedule import SCHEDULES
from tests.helpers.references import generator, p_value

CPU = torch.device("cpu")
MASK = 99


class TestClipInterval:
    @pytest.mark.parametrize(
        ("low", "high"), [(0.0, 1.0), (-0.1, 0.5), (0.6, 0.5), (0.5, 1.1), (1e-9, 1.0)]
    )
    def test_bad_bounds_name_the_keys(self, low, high):
        with pytest.raises(ValueError, match="sampling_eps_min=.*sampling_eps_max=.*0 < min <="):
            ClipInterval(low, high)

    @pytest.mark.parametrize("interval", [FULL, NLL, ClipInterval(0.3, 0.8), ClipInterval(0.05, 1)])
    @pytest.mark.parametrize("block_size", [1, 4, 10, 16, 1024])
    def test_a_float32_buffer_brings_the_same_range_back(self, interval, block_size):
        """1e-3 in float32 is not 1e-3.

        The original's training read the range from its buffers and the search for it from Python
        numbers: "is this the full range's bound" was answered differently, so blocks were
        redrawn in the one and not in the other, and variances of two distributions were compared.
        """
        low, high = torch.tensor([interval.low, interval.high], dtype=torch.float32)
        restored = ClipInterval(low.item(), high.item())
        assert restored == interval
        assert restored.mask_counts(block_size) == interval.mask_counts(block_size)
        assert low.item() != 1e-3  # the trap itself

    @pytest.mark.parametrize(
        ("low", "high", "block_size", "expected"),
        [
            (1e-3, 1.0, 4, range(0, 5)),  # the full range forbids nothing
            (0.3, 0.8, 4, range(2, 4)),
            (0.25, 0.75, 4, range(1, 4)),  # a bound that is a fraction itself belongs
            (1e-3, 0.5, 4, range(0, 3)),  # one-sided: nothing masked is allowed
            (0.5, 1.0, 4, range(2, 5)),
            (0.3, 0.7, 10, range(3, 8)),
            (1.0, 1.0, 1, range(1, 2)),
            (0.666667, 1.0, 3, range(2, 4)),  # a third of a block, in six decimals
            (1e-3, 0.333333, 3, range(0, 2)),
            (0.3, 0.4, 2, range(1, 1)),
        ],
    )
    def test_mask_counts(self, low, high, block_size, expected):
        found = ClipInterval(low, high).mask_counts(block_size)
        assert list(found) == list(expected)

    def test_every_multiple_of_five_hundredths_is_its_own_count(self):
        """0.15 * 20 is 3.0000000000000004 somewhere on the way: rounding must not lose a count."""
        for k in range(1, 20):
            assert ClipInterval(k * 0.05, 1.0).mask_counts(20).start == k
            assert ClipInterval(1e-3, k * 0.05).mask_counts(20)[-1] == k


class TestSampleT:
    @pytest.mark.parametrize("interval", [FULL, NLL, ClipInterval(0.3, 0.8)])
    @pytest.mark.parametrize("antithetic", [True, False])
    def test_range_and_shape(self, interval, antithetic):
        t = sample_t(
            (64, 8), interval=interval, antithetic=antithetic, device=CPU, generator=generator()
        )
        assert t.shape == (64, 8) and t.dtype == torch.float32
        eps = 1e-6
        assert t.min() >= interval.low - eps and t.max() <= interval.high
        assert t.max() - t.min() >= 0.98 * (interval.high - interval.low)

    def test_everything_is_masked_when_the_range_is_one(self):
        t = sample_t((3, 8), interval=NLL, antithetic=True, device=CPU, generator=generator())
        assert torch.equal(t, torch.ones(3, 8))

    def test_one_time_in_each_stratum(self):
        """Low discrepancy: entry i of the flattened (B, K) lies in the i-th of B K equal parts."""
        t = sample_t((16, 8), interval=FULL, antithetic=True, device=CPU, generator=generator())
        unit = (t - FULL.low) / (FULL.high - FULL.low)
        place = unit.flatten() * 128 - torch.arange(128)
        assert place.min() >= -1e-3 and place.max() <= 1 + 1e-3

    @pytest.mark.parametrize("antithetic", [True, False])
    def test_uniform_overall_and_inside_the_strata(self, antithetic):
        draws = [
            sample_t(
                (5, 4), interval=FULL, antithetic=antithetic, device=CPU, generator=generator(seed)
            )
            for seed in range(500)
        ]
        unit = (torch.stack(draws) - FULL.low) / (FULL.high - FULL.low)
        for values in (unit.flatten(), (unit.flatten() * 20) % 1):
            counts = torch.histc(values, bins=20, min=0, max=1)
            expected = torch.full_like(counts, len(values) / 20)
            # Strata make the coarse histogram exactly even, which is as good as it gets.
            assert p_value(counts, expected) > 1e-4

    def test_antithetic_means_vary_less(self):
        """What it is for: the mean of t over a batch hardly changes from batch to batch."""
        spread = [
            torch.stack(
                [
                    sample_t(
                        (8, 8), interval=FULL, antithetic=antithetic, device=CPU, generator=g
                    ).mean()
                    for g in [generator(s) for s in range(100)]
                ]
            ).std()
            for antithetic in (True, False)
        ]
        assert spread[0] < spread[1] / 20

    def test_the_generator_decides(self):
        first, again, other = (
            sample_t((3, 4), interval=FULL, antithetic=True, device=CPU, generator=generator(s))
            for s in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)


class TestQxt:
    x_0 = torch.arange(50).repeat(400, 1)

    @pytest.mark.parametrize("name", list(SCHEDULES))
    @pytest.mark.parametrize("t", [0.05, 0.4, 0.97])
    def test_mask_rate_is_p(self, name, t):
        """Within five standard deviations of the binomial."""
        p = SCHEDULES[name].move_chance(torch.tensor(t)).item()
        u = torch.rand(self.x_0.shape, generator=generator())
        x_t = q_xt(
            self.x_0, u=u, move_chance=torch.tensor([[p]]), mask_index=MASK, ignore_bos=False
        )
        masked = x_t == MASK
        assert torch.equal(x_t[~masked], self.x_0[~masked])
        n = masked.numel()
        assert abs(masked.sum() - n * p) < 5 * math.sqrt(n * p * (1 - p))

    def test_every_position_has_its_own_p(self):
        p = torch.tensor([0.0, 0.3, 1.0]).repeat_interleave(2)[None]
        u = torch.rand(2000, 6, generator=generator())
        rate = (
            (q_xt(torch.zeros(2000, 6), u=u, move_chance=p, mask_index=MASK, ignore_bos=False))
            .eq(MASK).float().mean(dim=0)
        )  # fmt: skip
        torch.testing.assert_close(rate, p[0], rtol=0, atol=0.06)
        assert (rate[:2] == 0).all() and (rate[4:] == 1).all()

    def test_equality_counts_as_masked(self):
        """u <= p, as the original compares: at u = p the golden x_t is masked."""
        x_t = q_xt(
            torch.zeros(1, 3, dtype=torch.long), u=torch.tensor([[0.4, 0.5, 0.6]]),
            move_chance=torch.tensor([[0.5]]), mask_index=MASK, ignore_bos=False,
        )  # fmt: skip
        assert x_t.tolist() == [[MASK, MASK, 0]]

    def test_exact_nll_masks_everything_but_bos(self):
        """L = 1 and t = 1: p = 1, and no uniform exceeds it."""
        t = sample_t((400, 50), interval=NLL, antithetic=True, device=CPU, generator=generator())
        u = torch.rand(400, 50, generator=generator())
        u[0, 1] = 1 - 2**-24  # the largest float32 that a draw can be
        for ignore_bos in (False, True):
            x_t = q_xt(self.x_0, u=u, move_chance=t, mask_index=MASK, ignore_bos=ignore_bos)
            assert (x_t[:, 1:] == MASK).all()
            assert (x_t[:, 0] == (0 if ignore_bos else MASK)).all()

    def test_inputs_are_left_alone(self):
        x_0, u = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4)
        q_xt(x_0, u=u, move_chance=torch.ones(1, 1), mask_index=MASK, ignore_bos=True)
        assert not x_0.any() and not u.any()


# --- several draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [FULL, ClipInterval(0.3, 0.8)])
def test_times_are_spread_over_draws_too(interval):
    """Of a block, one in each of D equal strata; of a draw, still one in each of B K."""
    t = sample_t((3, 5), interval=interval, antithetic=True, device=torch.device("cpu"))
    found = spread_over_draws(t, num_draws=4, interval=interval)
    assert found.shape == (4, 3, 5) and torch.equal(found[0], t)
    assert interval.low <= found.min() and found.max() <= interval.high
    share = (found - interval.low) / (interval.high - interval.low)
    stratum_of_draw = (share * 4).long().clamp(max=3)
    assert torch.equal(stratum_of_draw.sort(dim=0).values[:, 0, 0], torch.arange(4))
    assert (stratum_of_draw.sort(dim=0).values == torch.arange(4)[:, None, None]).all()
    for draw in share:  # neighbours are no further apart than two strata, around the circle
        gaps = draw.flatten().sort().values.diff()
        assert gaps.max() < 2 / 15 + 1e-5


def test_everything_masked_stays_so_in_every_draw():
    t = torch.ones(2, 3)
    assert (spread_over_draws(t, num_draws=3, interval=NLL) == 1).all()
