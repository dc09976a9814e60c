"""The architecture's arrows: an import may only point to a lower layer."""

import ast
from pathlib import Path

import pytest

LEVELS = {
    "main": 7,
    "push_to_hf": 6,
    "batch_size": 6,
    "evaluation": 6,
    "generation": 6,
    "pretrained": 5,
    "diffusion": 4,
    "models.hf": 4,
    "dataloader": 3,
    "sampling": 3,
    "sampling_requests": 4,
    "clipped_schedule": 3,
    "configuration": 3,
    "token_losses": 3,
    "data_requests": 2,
    "generative_perplexity": 2,
    "training": 2,
    "objectives": 2,
    "forward_process": 2,
    "resolvers": 1,
    "corpora": 1,
    "models": 1,
    "seeds": 0,
    "utils": 1,
    "metrics": 1,
    "sample_log": 1,
    "noise_schedule": 1,
    "report": 1,
}

# Packages inside others that have a level of their own.
NESTED = {"models.hf"}

# What must stay usable without these packages.
FORBIDDEN = {
    "sampling": {"lightning", "hydra", "omegaconf"},
    "objectives": {"lightning", "hydra", "omegaconf"},
    "token_losses": {"lightning", "hydra", "omegaconf"},
    "models": {"lightning", "hydra", "omegaconf"},
    "models.hf": {"lightning", "hydra", "omegaconf"},
    "configuration": {"lightning", "hydra"},
    "resolvers": {"lightning", "hydra"},
}

ROOT = Path(__file__).resolve().parents[1]
# Folders of the root that are no part of the program.
OUTSIDE = {"tests", "benchmarks", "ssd-lm", "scripts", "configs", "outputs"}


def units() -> dict[str, list[Path]]:
    """Returns the files of each module and package of the root."""
    found = {path.stem: [path] for path in ROOT.glob("*.py")}
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in OUTSIDE:
            files = sorted(folder.rglob("*.py"))
            if files:
                found[folder.name] = files
    for name in NESTED:
        outer, inner = name.split(".")
        found[name] = [path for path in found[outer] if path.parent.name == inner]
        found[outer] = [path for path in found[outer] if path.parent.name != inner]
    return found


def unit_of(module: str) -> str:
    """Returns the unit that a module belongs to, by its full name."""
    first, *rest = module.split(".")
    nested = ".".join([first, *rest[:1]])
    return nested if nested in NESTED else first


def imported(path: Path) -> set[str]:
    """Returns the names of units that a file imports absolutely, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {unit_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(unit_of(node.module))
    return names


UNITS = units()


def test_every_unit_has_a_level():
    """A new module or package takes its place in the table, and hides no library."""
    assert set(UNITS) <= set(LEVELS)
    assert "datasets" not in UNITS


@pytest.mark.parametrize("unit", sorted(UNITS))
def test_imports_point_down(unit):
    """Inside a package anything goes; between units only a lower level may be imported."""
    for path in UNITS[unit]:
        for name in (imported(path) & set(LEVELS)) - {unit}:
            assert LEVELS[name] < LEVELS[unit], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("unit", sorted(FORBIDDEN))
def test_frameworks_stay_out(unit):
    """The mathematics knows neither Lightning nor Hydra; the configuration knows no Lightning."""
    for path in UNITS.get(unit, []):
        assert not imported(path) & FORBIDDEN[unit], path.relative_to(ROOT)
