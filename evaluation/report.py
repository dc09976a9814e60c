"""What a run leaves for the eye: a training-curve picture and a table of results."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

TRAIN_CURVE, VALIDATION_CURVE = "trainer/loss", "val/nll"


def read_curve(metrics_csv: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged name in Lightning's CSV log; empty where it is missing."""
    if not metrics_csv.exists():  # a run too short to log anything
        return [], []
    with metrics_csv.open(newline="") as file:
        points = [(row["step"], row.get(name)) for row in csv.DictReader(file)]
    points = [(int(step), float(value)) for step, value in points if value]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float], *, window: int) -> list[float]:
    """Trailing means over at most `window` values."""
    means = []
    for i in range(len(values)):
        recent = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(recent) / len(recent))
    return means


def draw_training_curve(metrics_csv: Path, png: Path, *, title: str) -> None:
    """Draw training loss and validation NELBO over steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = read_curve(metrics_csv, TRAIN_CURVE)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    window = max(1, len(losses) // 50)
    axes.plot(steps, losses, color="#b8c7e0", linewidth=1, label="training loss")
    axes.plot(steps, smooth(losses, window=window), color="#2f5597", linewidth=2,
              label=f"training loss, mean of {window}")  # fmt: skip
    val_steps, val_nll = read_curve(metrics_csv, VALIDATION_CURVE)
    axes.plot(val_steps, val_nll, "o-", color="#c55a11", label="validation NELBO (EMA)")
    if val_nll:
        axes.annotate(f"{val_nll[-1]:.3f}", (val_steps[-1], val_nll[-1]),
                      textcoords="offset points", xytext=(-4, 8), ha="right")  # fmt: skip
    axes.set(title=title, xlabel="optimizer step", ylabel="nats per token")
    if shown := sorted(filter(math.isfinite, losses + val_nll)):
        axes.set_ylim(shown[0] * 0.95, shown[int(0.98 * (len(shown) - 1))] * 1.1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png)


def print_table(title: str, values: Mapping[str, object]) -> None:
    """Print names and values as a two-column table; a pair is the two ends of an interval."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        ends = value if isinstance(value, tuple) else (value,)
        table.add_row(name, " to ".join(map(_shown, ends)))
    Console().print(table)


def _shown(value: object) -> str:
    return format(value, {float: ",.4f", int: ",d"}.get(type(value), ""))
