"""The picture of the attention mask is that of the code."""

import itertools
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from models.masks import AttentionPattern, may_attend
from scripts.draw_attention_mask import BLOCK_SIZE, LENGTH, PARTS, PICTURE, draw

# The panels of the picture, in the order of its axes: pattern, block size, length of a half.
PANELS = (
    (AttentionPattern.BLOCK_DIFFUSION, BLOCK_SIZE, 2 * LENGTH),
    (AttentionPattern.BLOCK_CAUSAL, BLOCK_SIZE, LENGTH),
    (AttentionPattern.BLOCK_DIFFUSION, 1, 2 * LENGTH),
    (AttentionPattern.BLOCK_DIFFUSION, LENGTH, 2 * LENGTH),
)


@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "drawn"])
def test_picture_agrees_with_the_mask(is_committed, tmp_path):
    """Each cell has the colour of its part where `may_attend` allows it, and grey elsewhere."""
    path = PICTURE if is_committed else tmp_path / "mask.png"
    figure = draw()
    figure.savefig(tmp_path / "mask.png")  # also settles where the axes are
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(path)[..., :3]
    width, height = figure.get_size_inches() * figure.dpi
    assert pixels.shape[:2] == (round(height), round(width))
    colors = np.array([to_rgb(color) for _, color in PARTS])
    for axes, (pattern, block_size, size) in zip(figure.axes, PANELS, strict=True):
        index = torch.arange(size)
        seen = may_attend(
            index[:, None], index[None, :],
            pattern=pattern, length=LENGTH, block_size=block_size,
        )  # fmt: skip
        for query, key in itertools.product(range(size), repeat=2):
            x, y = axes.transData.transform((key, query))
            color = pixels[round(height - y), round(x)]
            part = int(np.abs(colors - color).sum(axis=1).argmin())
            assert np.allclose(colors[part], color, atol=0.01)
            is_noisy = (query < LENGTH, key < LENGTH)
            in_training = {(True, True): 1, (True, False): 2, (False, False): 3}.get(is_noisy, 0)
            allowed = 3 if pattern is AttentionPattern.BLOCK_CAUSAL else in_training
            assert part == (allowed if seen[query, key] else 0), (query, key)
