"""What settings of a sampler give: points on disk, as a table, and as curves in a picture."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from corpora.lines import read_json_lines
from utils import json_text, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A longer axis than this, largest value by smallest, is logarithmic.
LONG = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting. Figures are means over its texts; None: there is none, or no error of it.

    Attributes:
        key: hex digits of everything that determines the texts and their scores.
        grid: the keys that had several values in the command, in its order, with those of here.
        settings: all keys that tell how texts are drawn, with their values.
        checkpoint, scorer: as they were named.
        checkpoint_hash, scorer_hash: of their files; None: their name on the Hub tells them.
        length, seed, num_texts: `model.length`, `seed`, texts that were drawn.
        gen_ppl, gen_ppl_error: generative perplexity, with the standard error over texts.
        entropy, entropy_error: of the scorer's tokens in a text, nats.
        tokens_per_pass, tokens_per_second: new tokens of all texts by passes, and by seconds.
        samples: the folder of the texts, beside the file of points.
        machine: where and when, and versions.
    """

    key: str
    grid: dict[str, Any]
    settings: dict[str, Any]
    checkpoint: str
    checkpoint_hash: str | None
    scorer: str
    scorer_hash: str | None
    length: int
    seed: int
    num_texts: int
    gen_ppl: float | None
    gen_ppl_error: float | None
    entropy: float | None
    entropy_error: float | None
    tokens_per_pass: float | None
    tokens_per_second: float
    samples: str
    machine: dict[str, Any]

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What two points must share to be compared."""
        return (self.scorer_hash or self.scorer, self.length)


def read_points(path: str) -> list[Point]:
    """The points of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names file and line of what is no point.
    """
    names = {field.name for field in dataclasses.fields(Point)}
    points = []
    for where, entries in read_json_lines(path):
        if entries.keys() != names:
            odd = ", ".join(sorted(entries.keys() ^ names))
            raise ValueError(f"{where}: no point of a frontier, it lacks or has too much: {odd}")
        points.append(Point(**entries))
    return points


def write_points(path: str, points: Sequence[Point]) -> None:
    """Write the file, a line of JSON for each point, whole or not at all."""
    write_text(path, "".join(json_text(dataclasses.asdict(point)) + "\n" for point in points))


def comparable(points: Sequence[Point], *, to: Point) -> list[Point]:
    """The points that may stand in one picture with `to`: the last one of each setting."""
    alike = [point for point in points if point.conditions == to.conditions]
    return list({json.dumps(point.settings): point for point in alike}.values())


# --- words ------------------------------------------------------------------------------------


def spelled(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def setting_text(settings: dict[str, Any]) -> str:
    """`temperature=0.9, tokens_per_step=2`."""
    return ", ".join(f"{short(key)}={spelled(value)}" for key, value in settings.items())


def short(key: str) -> str:
    """A key without the section that most of them are of."""
    return key.removeprefix("sampling.")


def with_error(mean: float | None, error: float | None) -> str:
    """`324.1 ± 9.8`, to as many digits as the error has two of."""
    if mean is None:
        return "-"
    digits = 1 - math.floor(math.log10(error or mean / 100 or 1))
    digits = min(max(digits, 0), 4)
    return f"{mean:,.{digits}f}" + ("" if error is None else f" ± {error:,.{digits}f}")


def varying_keys(points: Sequence[Point]) -> list[str]:
    """The settings in which points differ."""
    keys = dict.fromkeys(key for point in points for key in point.settings)
    return [key for key in keys if len({json.dumps(p.settings.get(key)) for p in points}) > 1]


def frontier_table(points: Sequence[Point], *, title: str) -> Table:
    """A row for each point; columns for the keys, and what else of its making, that differ."""
    table = Table(title=title, title_justify="left")
    keys = varying_keys(points)
    others = [
        name
        for name in ("scorer", "length", "seed")
        if len({getattr(point, name) for point in points}) > 1
    ]
    measured = ("gen. ppl", "entropy", "tokens/pass", "tokens/s")
    for heading in (*map(short, keys), *others, "texts", *measured):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        passes = point.tokens_per_pass
        table.add_row(
            *(spelled(point.settings.get(key)) for key in keys),
            *(spelled(getattr(point, name)) for name in others),
            str(point.num_texts),
            with_error(point.gen_ppl, point.gen_ppl_error),
            with_error(point.entropy, point.entropy_error),
            "-" if passes is None else f"{passes:.2f}",
            f"{point.tokens_per_second:,.0f}",
        )
    return table


# --- curves -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Points that differ in one key alone, in the order of its values.

    Attributes:
        along: that key; None of a point that is alone.
        points: at least one.
        label: what tells it from the other curves.
    """

    along: str | None
    points: list[Point]
    label: str


def curves(points: Sequence[Point], *, end: int) -> list[Curve]:
    """The curves through points.

    A point lies on the curve along the first (`end` 0) or the last (`end` -1) key of its grid, and
    on those of other points from which it differs in that curve's key alone. A key that is null is
    off, which is no place on a curve, unless it is of the curve's own grid.
    """
    found: dict[tuple[str, str], list[Point]] = {}
    for seed in points:
        if not seed.grid:
            continue
        along = list(seed.grid)[end]
        name = along, _others(seed, along)
        if name not in found:
            alike = [point for point in points if _others(point, along) == name[1]]
            found[name] = [p for p in alike if p.settings[along] is not None or along in p.grid]
    lines = {name: line for name, line in found.items() if len(line) > 1}
    on_lines = {point.key for line in lines.values() for point in line}
    alone = [point for point in points if point.key not in on_lines]
    drawn = [(along, line) for (along, _), line in lines.items()] + [(None, [p]) for p in alone]
    keys = varying_keys(points)
    return [
        Curve(along, sorted(line, key=lambda p: _place(p.settings.get(along))),
              _label(along, line, drawn, keys))
        for along, line in drawn
    ]  # fmt: skip


def _others(point: Point, along: str) -> str:
    return json.dumps({key: value for key, value in point.settings.items() if key != along})


def _place(value: Any) -> tuple[int, float]:
    """Where a value stands: numbers by size, all else behind them as it came."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, value) if is_number else (1, 0.0)


def _label(
    along: str | None, line: list[Point], drawn: list[tuple[str | None, list[Point]]],
    keys: list[str],
) -> str:  # fmt: skip
    """The key along which a curve runs, if others run along another, and what else differs."""
    own, beside = line[0].settings, [other[0].settings for name, other in drawn if name == along]
    differing = {k for k in keys if len({json.dumps(settings.get(k)) for settings in beside}) > 1}
    shown_keys = keys if along is None else [k for k in keys if k in differing - {along}]
    rest = {key: own.get(key) for key in shown_keys}
    shown = {key: value for key, value in rest.items() if value is not None} or rest
    words = [short(along)] if along and len({name for name, _ in drawn if name}) > 1 else []
    words += [setting_text(shown)] if shown else []
    return ", ".join(words) or (f"along {short(along)}" if along else "one setting")


# --- picture ----------------------------------------------------------------------------------


def draw_frontier(points: Sequence[Point], png: Path, *, title: str) -> None:
    """Draw generative perplexity over entropy, and over tokens per pass, into a PNG.

    On the left curves run along the first key of a grid, on the right along the last.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    known = [point for point in points if point.gen_ppl is not None]
    for curve, style in zip(curves(known, end=0), _styles("tab10", "o"), strict=False):
        _draw_curve(left, curve, [p.entropy for p in curve.points],
                    errors=[p.entropy_error for p in curve.points], style=style)  # fmt: skip
    on_right = [point for point in known if point.tokens_per_pass is not None]
    for curve, style in zip(curves(on_right, end=-1), _styles("Dark2", "s"), strict=False):
        _draw_curve(right, curve, [p.tokens_per_pass for p in curve.points], style=style)
    left.set(xlabel="entropy of a text, nats", ylabel="generative perplexity")
    right.set(xlabel="new tokens per forward pass")
    _suit_axis(left, "y", [point.gen_ppl for point in known])
    _suit_axis(right, "x", [point.tokens_per_pass for point in on_right])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(png)


def _styles(colors: str, marker: str) -> Iterator[dict[str, Any]]:
    """A look for one curve after another; colours of the two panels mean different things."""
    from matplotlib import colormaps

    for color in itertools.cycle(colormaps[colors].colors):
        yield {"color": color, "marker": marker}


def _draw_curve(
    axes: "Axes", curve: Curve, x: Sequence[float], *, style: dict[str, Any],
    errors: Sequence[float | None] | None = None,
) -> None:  # fmt: skip
    """One curve, with error bars and, at its points, the values along it."""
    y = [point.gen_ppl for point in curve.points]
    axes.errorbar(
        x, y, label=curve.label, markersize=4, linewidth=1.2, capsize=2, elinewidth=0.8,
        xerr=None if errors is None else [math.nan if e is None else e for e in errors],
        yerr=[math.nan if p.gen_ppl_error is None else p.gen_ppl_error for p in curve.points],
        **style,
    )  # fmt: skip
    for point, place in zip(curve.points, zip(x, y, strict=True), strict=True):
        if curve.along is not None:
            axes.annotate(
                spelled(point.settings[curve.along]), place, color=style["color"], fontsize=7.5,
                textcoords="offset points", xytext=(-4, 4), ha="right",
            )  # fmt: skip


def _suit_axis(axes: "Axes", name: str, values: Sequence[float]) -> None:
    """Logarithmic, with plain numbers, where values are far apart; name: x or y."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(values, default=0) > 0 and max(values) > LONG * min(values):
        marks = (1, 1.5, 2, 3, 4, 6, 8) if max(values) < 20 * min(values) else (1, 2, 5)
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=marks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_locator(NullLocator())
