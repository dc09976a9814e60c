"""Checks of `ssd_lm/`: the noise schedule, and a text replayed from its recorded draws."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.parity.rows import Golden, Row, absolute, count_different, load_golden

# No import statement can name this folder, because of its dash.
sys.path.append(str(Path(__file__).resolve().parents[2] / "ssd-lm"))

from ssd_model import SSDModel, load_model
from ssd_sampling import SSDSettings, alpha_bar, sample_text

SCHEDULE = 1e-6  # the tolerance of the golden files' README


class RecordedDraws:
    """Gives out the recorded draws in their order, and counts those outside the nucleus."""

    def __init__(self, golden: Golden):
        noise, steps = golden["noise0"], golden["z"]  # (blocks, B, L, V), (blocks, T, B, L, V)
        self.normals = iter([n for i, z in enumerate(steps) for n in (noise[i], *z)])
        self.tokens = iter(golden["selected"].flatten(0, 1))  # (B, L) each
        self.num_outside = 0

    def normal(self, shape: tuple[int, int, int]) -> Tensor:
        """The next recorded normals, (B, L, V)."""
        normals = next(self.normals)
        assert normals.shape == shape
        return normals

    def choose(self, probs: Tensor) -> Tensor:
        """The next recorded tokens, (B, L)."""
        tokens = next(self.tokens)
        self.num_outside += int((probs.gather(-1, tokens[..., None]) == 0).sum())
        return tokens


def replay(model: SSDModel, golden: Golden) -> tuple[Tensor, RecordedDraws]:
    """The text (B, length) that the recorded draws lead to, and the draws, used up."""
    meta = golden.meta
    draws = RecordedDraws(golden)
    tokens = sample_text(
        model,
        golden["context"],
        length=meta["num_blocks"] * meta["block_size"],
        vocab_size=meta["vocab_size"],
        settings=SSDSettings(
            block_size=meta["block_size"],
            num_steps=meta["total_t"],
            top_p=meta["projection_top_p"],
            one_hot_value=meta["one_hot_value"],
        ),
        draws=draws,
    )
    return tokens, draws


def ssd_rows(folder: Path) -> Iterator[Row]:
    """Schedule, tokens and nucleus of a folder with the network and `expected.safetensors`."""
    golden = load_golden(folder / "expected.safetensors")
    for name in sorted(name for name in golden.tensors if name.startswith("alpha_bar_")):
        lag = int("prev" in name)
        num_steps = len(golden[name])
        found = [alpha_bar(t - lag, num_steps=num_steps) for t in range(1, num_steps + 1)]
        yield Row(folder.name, name, absolute(torch.tensor(found), golden[name]), SCHEDULE)
    tokens, draws = replay(load_model(str(folder)), golden)
    unequal = count_different(tokens, golden["tokens"])
    yield Row(folder.name, f"tokens: unequal of {tokens.numel()}", unequal, 0.0)
    compared = f"draws outside the nucleus, of {golden['selected'].numel()}"
    yield Row(folder.name, compared, float(draws.num_outside), 0.0)
