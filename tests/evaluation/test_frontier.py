"""Points of a frontier: their file, their table, the curves through them and the picture."""

import io
import math

import pytest
from matplotlib.image import imread
from rich.console import Console

from evaluation.frontier import (
    Point,
    comparable,
    curves,
    draw_frontier,
    frontier_table,
    read_points,
    spelled,
    with_error,
    write_points,
)

OFF = {"sampling.temperature": 1.0, "sampling.tokens_per_step": 1,
       "sampling.confidence_threshold": None}  # fmt: skip


def point(key="a", *, grid=(), ppl=300.0, **settings):
    """A point whose grid is of the keys named in `grid`."""
    settings = OFF | {f"sampling.{name}": value for name, value in settings.items()}
    steps = settings["sampling.tokens_per_step"]
    return Point(
        key=key, grid={f"sampling.{name}": settings[f"sampling.{name}"] for name in grid},
        settings=settings, checkpoint="last.ckpt", checkpoint_hash="0", scorer="gpt2-large",
        scorer_hash=None, length=128, seed=1, num_texts=8, gen_ppl=ppl, gen_ppl_error=20.0,
        entropy=4.25, entropy_error=0.01, tokens_per_pass=float(steps), tokens_per_second=1000.0,
        samples=f"samples/{key}", machine={},
    )  # fmt: skip


def grid_of(*names, temperatures=(0.8, 1.0), steps=(1, 2, 4)):
    """Points of a grid with these axes."""
    return [
        point(f"{t} {n}", grid=names, temperature=t, tokens_per_step=n)
        for t in temperatures for n in steps
    ]  # fmt: skip


def shape(points, *, end):
    """Label, and values along the curve, of each curve."""
    return [
        (curve.label, [p.settings.get(curve.along) for p in curve.points])
        for curve in curves(points, end=end)
    ]


def test_a_file_of_points(tmp_path):
    """What is written is read again; infinity, which JSON lacks, is no figure."""
    path = str(tmp_path / "new" / "points.jsonl")
    points = grid_of("temperature", "tokens_per_step")
    write_points(path, [*points, point(ppl=math.inf)])
    assert read_points(path) == [*points, point(ppl=None)]
    (tmp_path / "bad.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 1: no point of a frontier, it lacks"):
        read_points(str(tmp_path / "bad.jsonl"))


def test_the_last_point_of_a_setting_stands_for_it():
    """More texts or another seed; with another scorer it is no point of the same picture."""
    first, second = point("a", ppl=300.0), point("b", ppl=310.0)
    assert comparable([first, second], to=first) == [second]
    other = Point(**(vars(second) | {"scorer": "gpt2"}))
    assert comparable([first, other], to=first) == [first]
    assert comparable([first, other], to=other) == [other]


def test_curves_run_along_the_first_or_the_last_key():
    points = grid_of("temperature", "tokens_per_step")
    assert shape(points, end=0) == [
        ("tokens_per_step=1", [0.8, 1.0]),
        ("tokens_per_step=2", [0.8, 1.0]),
        ("tokens_per_step=4", [0.8, 1.0]),
    ]
    assert shape(points, end=-1) == [
        ("temperature=0.8", [1, 2, 4]),
        ("temperature=1", [1, 2, 4]),
    ]
    assert shape(points[::-1], end=-1)[0] == ("temperature=1", [1, 2, 4])  # in order all the same


def test_two_grids_share_a_picture():
    """As `tokens_per_step` and `confidence_threshold` do, which exclude each other."""
    points = grid_of("tokens_per_step", temperatures=(1.0,))
    points += [
        point(f"{p}", grid=("confidence_threshold",), confidence_threshold=p) for p in (0.9, 0.5)
    ]
    assert shape(points, end=0) == [
        ("tokens_per_step", [1, 2, 4]),
        ("confidence_threshold", [0.5, 0.9]),  # null, one of the other grid, is no threshold
    ]
    alone = curves([*points, point("c", grid=("tokens_per_step",), temperature=0.5)], end=0)[-1]
    assert (alone.along, alone.label) == (None, "temperature=0.5, tokens_per_step=1")


def test_a_null_of_the_curves_own_grid_is_a_place_on_it():
    """Behind the numbers: `top_k=null` is all tokens."""
    points = [point(f"{k}", grid=("top_k",), top_k=k) for k in (None, 50, 5)]
    assert shape(points, end=0) == [("along top_k", [5, 50, None])]


def test_a_later_point_joins_a_curve_or_stands_alone():
    points = grid_of("tokens_per_step", temperatures=(1.0,))
    joined = shape([*points, point("later", tokens_per_step=8)], end=0)
    assert joined == [("along tokens_per_step", [1, 2, 4, 8])]
    alone = curves([*points, point("later", temperature=0.7)], end=0)
    assert [(c.along, len(c.points)) for c in alone] == [("sampling.tokens_per_step", 3), (None, 1)]
    assert alone[1].label == "temperature=0.7, tokens_per_step=1"
    assert alone[0].label == "along tokens_per_step"
    assert [c.label for c in curves([point()], end=0)] == ["one setting"]


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (324.314, 9.84, "324.3 ± 9.8"),
        (1876.06, 123.4, "1,876 ± 123"),
        (4.24813, 0.0123, "4.248 ± 0.012"),
        (4.2, None, "4.200"),
        (4.2, 0.0, "4.200 ± 0.000"),
        (None, None, "-"),
    ],
)
def test_a_figure_has_the_digits_of_its_error(mean, error, text):
    assert with_error(mean, error) == text


def test_values_are_spelled_as_typed():
    values = (0.9000000000000001, 1.0, None, True, "paper", ["A"], 2)
    assert [*map(spelled, values)] == ["0.9", "1", "null", "true", "paper", '["A"]', "2"]


def test_the_table_has_the_keys_that_differ():
    console = Console(width=150, file=io.StringIO())
    console.print(frontier_table(grid_of("tokens_per_step", temperatures=(1.0,)), title="all"))
    heading, first, *_ = [
        [cell.strip() for cell in line.strip("┃│\n").replace("┃", "│").split("│")]
        for line in console.file.getvalue().splitlines()
        if line[0] in "┃│"
    ]
    assert dict(zip(heading, first, strict=True)) == {
        "tokens_per_step": "1", "texts": "8", "gen. ppl": "300 ± 20",
        "entropy": "4.250 ± 0.010", "tokens/pass": "1.00", "tokens/s": "1,000",
    }  # fmt: skip


def test_the_picture_has_both_panels(tmp_path):
    """A single point, points without figures or errors, and far values are no trouble."""
    points = grid_of("temperature", "tokens_per_step")
    bare = vars(point("b", temperature=2.0)) | dict.fromkeys(
        ("gen_ppl_error", "entropy_error", "tokens_per_pass")
    )
    for shown in ([point(ppl=None)], [*points, Point(**bare), point("c", ppl=1e5, top_k=1)]):
        draw_frontier(shown, tmp_path / "a.png", title="title")
        picture = imread(tmp_path / "a.png")
        assert picture.shape[:2] == (572, 1320)
        halves = picture[60:, :660, :3], picture[60:, 660:, :3]
        has_color = [bool((half.max(-1) - half.min(-1) > 0.2).any()) for half in halves]
        assert has_color == [shown[0].gen_ppl is not None] * 2
