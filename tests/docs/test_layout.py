"""docs/layout.md agrees with the tree and with the floors that tests/test_layers.py checks."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.docs.pages import Page, page
from tests.helpers.places import PROJECT
from tests.test_layers import FLOORS

LAYOUT = "docs/layout.md"
_SUFFIXES = "py|md|sh|sbatch|cpp|html|png|txt|toml|yaml|json"
_PATH = re.compile(rf"\.?[\w.-]+(?:/[\w.-]+)*(?:/|\.(?:{_SUFFIXES}))|(?:[\w.-]+/)+[\w.-]+")


def tracked() -> list[str]:
    """Returns the files of the project as git knows them; what a user leaves beside is theirs."""
    if not (PROJECT / ".git").exists():
        pytest.skip("needs a git checkout")
    listing = subprocess.run(
        ["git", "ls-files"],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listing.stdout.splitlines() if (PROJECT / name).exists()]


def paths_named(found: Page) -> set[str]:
    """Returns what the page names in backticks that has the form of a path."""
    return {code for code in found.inline if _PATH.fullmatch(code)}


def missing_paths(found: Page, *, root: Path = PROJECT) -> list[str]:
    """Returns the named paths that do not exist; a folder's name ends in a slash."""
    is_there = {
        name: (root / name).is_dir() if name.endswith("/") else (root / name).is_file()
        for name in paths_named(found)
    }
    return sorted(name for name, there in is_there.items() if not there)


def unnamed_roots(found: Page, *, files: Sequence[str]) -> list[str]:
    """Returns top-level files and folders that the page does not name as such."""
    roots = {f"{name.split('/')[0]}/" if "/" in name else name for name in files}
    return sorted(roots - set(found.inline))


def floors_of(found: Page) -> list[set[str]]:
    """Returns the names on each floor of the page's table, from the top down."""
    (table,) = [table for table in found.tables if table.heading[0] == "floor"]
    numbers = [int(row["floor"]) for row in table.rows]
    assert numbers == list(range(len(numbers), 0, -1))
    cells = [row[table.heading[1]] for row in table.rows]
    return [
        {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", cell)}
        for cell in cells
    ]


def test_paths_exist():
    assert missing_paths(page(LAYOUT)) == []


def test_every_root_is_named():
    """Every tracked file or folder of the root is on the page."""
    assert unnamed_roots(page(LAYOUT), files=tracked()) == []


def test_every_room_is_named():
    """A folder of the root that holds Python has a row in the table of rooms."""
    (table,) = [table for table in page(LAYOUT).tables if table.heading[0] == "room"]
    rooms = {f"{name.split('/')[0]}/" for name in tracked() if re.fullmatch(r".+/.*\.py", name)}
    assert rooms <= set(table.first_column)


def test_floors_are_those_of_the_imports():
    assert floors_of(page(LAYOUT)) == [set(floor) for floor in FLOORS]


BROKEN = """# Layout

`main.py`, `models/`, `models/dit.py`, `no_such_room/`, `models/no_such_file.py`, `main.py/`,
and no paths: `key=value`, `training.compile`, `make help`, `L / N`, `tests/<room>/`.

| floor | what |
|---|---|
| 2 | `main.py`, `ssd-lm/` |
| 1 | `models/` |
"""


def test_what_is_wrong_is_found():
    broken = Page(LAYOUT, BROKEN)
    assert missing_paths(broken) == ["main.py/", "models/no_such_file.py", "no_such_room/"]
    assert unnamed_roots(broken, files=["main.py", "models/dit.py", "utils.py", "docs/a.md"]) == [
        "docs/",
        "utils.py",
    ]
    assert floors_of(broken) == [{"main", "ssd-lm"}, {"models"}]
