"""Checks of `noise_schedules`, `ema` and `clip_search`."""

from collections.abc import Iterator
from pathlib import Path

import torch

from losses.clipped_schedule import ClippedScheduleSearch, candidate_intervals, logged_name
from losses.forward_process import ClipInterval
from models.ema import ExponentialMovingAverage
from noise_schedule import get_noise
from tests.parity.rows import Row, absolute, load_golden, relative

NOISE, EMA = 1e-6, 1e-7  # the tolerances of the golden files' README
# `logged` must be equal; the original's float32 sums leave room for their rounding.
FLOAT32_ROUNDING = 1e-6


def noise_rows(path: Path) -> Iterator[Row]:
    """Every quantity of every schedule in the file, relative to its size."""
    golden = load_golden(path)
    t = golden["t"]
    names = sorted({name.split(".")[0] for name in golden.tensors if "." in name})
    for name in names:
        noise = get_noise(name)
        values = noise(t)
        found = {
            "loss_scaling": values.loss_scaling,
            "move_chance": values.move_chance,
            "total_noise": noise.total_noise(t),
            "rate_noise": noise.rate_noise(t),
        }
        for quantity, tensor in found.items():
            key = f"{name}.{quantity}"
            if key in golden.tensors:
                yield Row(path.name, key, relative(tensor, golden[key]), NOISE)


def ema_rows(path: Path) -> Iterator[Row]:
    """The shadow after each update."""
    golden = load_golden(path)
    starts = [name for name in golden.tensors if name.endswith(".init")]
    parameters = [torch.nn.Parameter(golden[f"p{i}.init"].clone()) for i in range(len(starts))]
    ema = ExponentialMovingAverage(parameters, decay=golden.meta["decay"])
    differences = []
    for step in range(golden.meta["steps"]):
        for i, parameter in enumerate(parameters):
            parameter.data.copy_(golden[f"p{i}.step{step}"])
        ema.update(parameters)
        differences += [
            absolute(shadow, golden[f"shadow{i}.step{step}"]) for i, shadow in enumerate(ema.shadow)
        ]
    yield Row(path.name, f"shadow after {golden.meta['steps']} updates", max(differences), EMA)


def clip_rows(path: Path) -> Iterator[Row]:
    """The candidates, the variances logged, and the range chosen."""
    golden = load_golden(path)
    meta = golden.meta
    expected = [ClipInterval(*interval) for interval in meta["intervals"]]
    found = candidate_intervals(
        block_size=4, widths=meta["clip_search_widths"], delta=meta["clip_search_delta"]
    )
    unequal = (
        len(found)
        if len(found) != len(expected)
        else sum(a != b for a, b in zip(found, expected, strict=True))
    )
    yield Row(path.name, f"candidates ({len(expected)})", float(unequal), 0.0)

    search = ClippedScheduleSearch(expected)
    for i, interval in enumerate(expected):
        for batch_idx, losses in enumerate(golden[str(i)]):
            search.update(interval, losses, batch_idx=batch_idx)
    names = [logged_name(interval) for interval in expected]
    unknown = float(len(set(names) ^ set(meta["logged"])))
    yield Row(path.name, "names logged", unknown, 0.0)
    logged = torch.tensor([meta["logged"].get(name, float("nan")) for name in names])
    difference = relative(torch.stack(search.compute()), logged)
    yield Row(path.name, "variances logged", difference, FLOAT32_ROUNDING)
    wrong = float(search.best() != ClipInterval(*meta["best"]))
    yield Row(path.name, "range chosen", wrong, 0.0)
