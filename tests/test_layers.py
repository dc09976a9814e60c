"""The architecture's arrows: an import only points down, from any floor to a lower one."""

import ast
from pathlib import Path

import pytest

from tests.helpers.places import PROJECT

# From the top down, as docs/layout.md shows them. Rooms of one floor know nothing of each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("main", "benchmarks", "scripts", "ssd-lm", "push_to_hf"),
    ("modes",),
    ("diffusion", "hf"),
    ("dataloader", "training"),
    ("configuration", "evaluation"),
    ("likelihood",),
    ("sampling", "losses", "checkpointing"),
    ("models", "corpora"),
    ("noise_schedule", "utils"),
)
FLOOR_OF = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}

# What must stay usable without these packages. The configuration stops at the modes: below them
# nobody sees an OmegaConf container, `Diffusion` and what reads the sections aside.
ABSENT = {
    "omegaconf": set(FLOOR_OF) - {*FLOORS[0], "modes", "diffusion", "configuration"},
    "hydra": set(FLOOR_OF) - {*FLOORS[0], "diffusion", "training"},
    "lightning": {
        "configuration", "evaluation", "likelihood", "sampling", "losses", "models", "corpora",
        "hf", "noise_schedule", "utils",
    },
}  # fmt: skip

# Folders of the root that hold no part of the program.
OUTSIDE = {"tests", "configs", "docs", "outputs"}


def rooms() -> dict[str, list[Path]]:
    """The files of each module and each folder of the root."""
    found = {path.stem: [path] for path in PROJECT.glob("*.py")}
    for folder in PROJECT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in OUTSIDE:
            files = sorted(folder.rglob("*.py"))
            if files:
                found[folder.name] = files
    return found


def imported(path: Path) -> set[str]:
    """The full names of modules that a file imports, anywhere in it."""
    package = path.relative_to(PROJECT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join([*base, *filter(None, [node.module])]))
    return names


ROOMS = rooms()


def test_every_room_has_a_floor():
    """A new module or folder of the root takes its place, and hides no library."""
    assert set(ROOMS) == set(FLOOR_OF)
    assert "datasets" not in ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_point_down(room):
    """Inside a room anything goes; of others only those of lower floors may be imported."""
    for path in ROOMS[room]:
        for name in {module.split(".")[0] for module in imported(path)} & set(FLOOR_OF) - {room}:
            assert FLOOR_OF[name] < FLOOR_OF[room], f"{path.relative_to(PROJECT)} imports {name}"


@pytest.mark.parametrize("package", sorted(ABSENT))
def test_frameworks_stay_out(package):
    """The mathematics knows neither Lightning nor Hydra; the configuration stops at the modes."""
    for room in ABSENT[package]:
        for path in ROOMS[room]:
            found = {module.split(".")[0] for module in imported(path)}
            assert package not in found, f"{path.relative_to(PROJECT)} imports {package}"


def test_kernels_know_nothing_of_the_network():
    """They are arithmetic: of this project they import who may see whom, and each other."""
    allowed = {"models.masks", "utils"}
    for path in (PROJECT / "models/kernels").glob("*.py"):
        ours = {module for module in imported(path) if module.split(".")[0] in FLOOR_OF}
        ours = {module for module in ours if not module.startswith("models.kernels.")}
        assert ours <= allowed, f"{path.relative_to(PROJECT)} imports {ours - allowed}"
