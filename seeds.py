"""Seeds of independent streams of random numbers; apart from `utils.py`, which knows Lightning."""

import numpy as np

# Random numbers of different purposes come from different streams of one seed.
TRAIN_STREAM, VALIDATION_STREAM, SAMPLE_STREAM = 0, 1, 2


def derive_seed(*parts: int) -> int:
    """An independent 63-bit seed for each tuple of integers, such as (seed, rank, step)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
