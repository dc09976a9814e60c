"""Draws docs/attention_mask.png from `models.masks`: `python -m scripts.draw_attention_mask`."""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from models.masks import (
    AttentionPattern,
    block_diagonal,
    clean_block_causal,
    may_attend,
    offset_block_causal,
)

PICTURE = Path(__file__).resolve().parents[1] / "docs/attention_mask.png"
LENGTH, BLOCK_SIZE = 8, 2
WIDTH, HEIGHT, DPI = 12.4, 8.4, 125  # inches, inches, dots per inch

# A cell's number is the place of its part in this table; 0 is no attention.
PARTS = (
    ("no attention", "#eceef1"),
    ("block diagonal: a noisy block\nsees itself", "#3b6fb6"),
    ("offset block causal: a noisy block sees\nthe clean blocks before its own", "#e58a3c"),
    ("block causal: a clean block sees itself\nand the clean blocks before it", "#4c9f70"),
)
INK, FAINT = "#22262b", "#7d858f"


def indices(size: int) -> tuple[Tensor, Tensor]:
    """Query indices (size, 1) and key indices (1, size)."""
    index = torch.arange(size)
    return index[:, None], index[None, :]


def training_parts(*, length: int, block_size: int) -> Tensor:
    """Which part of the training mask lets query i see key j: (2N, 2N), numbers of `PARTS`.

    Where a clean block sees itself two parts agree; as in the paper it counts as block causal.
    """
    q, k = indices(2 * length)
    sizes = {"length": length, "block_size": block_size}
    parts = torch.zeros(2 * length, 2 * length, dtype=torch.int64)
    parts[block_diagonal(q, k, **sizes)] = 1
    parts[offset_block_causal(q, k, **sizes)] = 2
    parts[clean_block_causal(q, k, **sizes)] = 3
    return parts


def sampling_parts(*, length: int, block_size: int) -> Tensor:
    """The same for the sampling mask: (N, N), all of it block causal."""
    q, k = indices(length)
    pattern = AttentionPattern.BLOCK_CAUSAL
    return 3 * may_attend(q, k, pattern=pattern, length=length, block_size=block_size).long()


def draw_grid(axes: Axes, parts: Tensor, *, block_size: int, halves: int) -> None:
    """Draws cells; lines between tokens, thick ones between blocks, dark ones between halves."""
    size = len(parts)
    colors = ListedColormap([color for _, color in PARTS])
    axes.imshow(parts.numpy(), cmap=colors, vmin=0, vmax=len(PARTS) - 1, interpolation="nearest")
    for i in range(1, size):
        color, width, zorder = "white", 0.7, 1.5
        if i % block_size == 0 and block_size > 1:
            width = 2.6
        if halves == 2 and i == size // 2:
            color, width, zorder = INK, 2.0, 2.0
        axes.axhline(i - 0.5, color=color, linewidth=width, zorder=zorder)
        axes.axvline(i - 0.5, color=color, linewidth=width, zorder=zorder)
    for spine in axes.spines.values():
        spine.set(color=INK, linewidth=1.2)
    axes.tick_params(length=0, pad=5, colors=INK)


def label_blocks(axes: Axes, names: list[str], *, size: int, fontsize: float) -> None:
    """Writes one label per block along the top (keys) and the left (queries)."""
    width = size / len(names)
    places = [width * (i + 0.5) - 0.5 for i in range(len(names))]
    axes.set_xticks(places, names, fontsize=fontsize)
    axes.set_yticks(places, names, fontsize=fontsize)
    axes.xaxis.tick_top()


def label_halves(axes: Axes, *, size: int, fontsize: float, away: float) -> None:
    """Writes x_t and x_0 beside the two halves, `away` cells from the grid."""
    for i, name in enumerate((r"noisy  $x_t$", r"clean  $x_0$")):
        middle = size * (0.25 + 0.5 * i) - 0.5
        style = {"fontsize": fontsize, "color": INK, "ha": "center", "va": "center"}
        axes.text(middle, -0.5 - away, name, **style)
        axes.text(-0.5 - away, middle, name, rotation=90, **style)


def draw_training(axes: Axes, *, length: int, block_size: int) -> None:
    """Draws the large panel."""
    num_blocks = length // block_size
    parts = training_parts(length=length, block_size=block_size)
    draw_grid(axes, parts, block_size=block_size, halves=2)
    names = [f"$x_{half}^{{{b + 1}}}$" for half in "t0" for b in range(num_blocks)]
    label_blocks(axes, names, size=2 * length, fontsize=13)
    label_halves(axes, size=2 * length, fontsize=13, away=1.5)
    axes.set_title(f"Training, $N = {length}$ tokens in blocks of $L = {block_size}$",
                   fontsize=15, color=INK, pad=62)  # fmt: skip
    axes.set_xlabel("each row is a query, each column a key that it may see",
                    fontsize=11.5, color=FAINT, labelpad=9)  # fmt: skip


def draw_sampling(axes: Axes, *, length: int, block_size: int) -> None:
    """Draws the panel of the sampling mask."""
    parts = sampling_parts(length=length, block_size=block_size)
    draw_grid(axes, parts, block_size=block_size, halves=1)
    names = [f"$x^{{{b + 1}}}$" for b in range(length // block_size)]
    label_blocks(axes, names, size=length, fontsize=12)
    axes.set_title(f"Sampling, $L = {block_size}$", fontsize=13, color=INK, pad=8)


def draw_extreme(axes: Axes, *, length: int, block_size: int, title: str) -> None:
    """Draws a small training panel."""
    parts = training_parts(length=length, block_size=block_size)
    draw_grid(axes, parts, block_size=block_size, halves=2)
    label_blocks(axes, ["$x_t$", "$x_0$"], size=2 * length, fontsize=11)
    axes.set_title(title, fontsize=12, color=INK, pad=6)


def add_square(figure: Figure, *, left: float, bottom: float, size: float) -> Axes:
    """Adds square axes, placed in inches."""
    return figure.add_axes((left / WIDTH, bottom / HEIGHT, size / WIDTH, size / HEIGHT))


def draw() -> Figure:
    """Returns the figure; its axes are training, sampling, L = 1 and L = N, in this order."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    training = add_square(figure, left=1.0, bottom=1.3, size=5.72)
    sampling = add_square(figure, left=8.35, bottom=4.22, size=2.8)
    one = add_square(figure, left=7.55, bottom=1.3, size=1.95)
    whole = add_square(figure, left=10.2, bottom=1.3, size=1.95)
    draw_training(training, length=LENGTH, block_size=BLOCK_SIZE)
    draw_sampling(sampling, length=LENGTH, block_size=BLOCK_SIZE)
    draw_extreme(one, length=LENGTH, block_size=1, title="Training, $L = 1$")
    draw_extreme(whole, length=LENGTH, block_size=LENGTH, title="Training, $L = N$")
    handles = [Patch(facecolor=color, edgecolor=FAINT, linewidth=0.6, label=text)
               for text, color in (*PARTS[1:], PARTS[0])]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=11.5,
                  labelcolor=INK, handlelength=1.3, handleheight=1.3, columnspacing=2.2,
                  bbox_to_anchor=(0.5, 0.015))  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("png", nargs="?", type=Path, default=PICTURE)
    path = parser.parse_args().png
    path.parent.mkdir(parents=True, exist_ok=True)
    draw().savefig(path, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    main()
