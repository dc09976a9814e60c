"""The requirements and constraints.txt: an environment that can be had again, to the version."""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement

from tests.helpers.places import PROJECT

# What everything needs, and what scripts that compare with the field need beside it.
REQUIREMENTS = ("requirements.txt", "requirements-eval.txt")
# What torch's CUDA build brings, and pins itself.
CUDA = re.compile(r"nvidia-|cuda-|triton")


def pins(name: str) -> dict[str, str]:
    """The packages of a file and their versions; every line must be `name==version`."""
    lines = (PROJECT / name).read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9a-z.]*)", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {canonical(match[1]): match[2] for match in matches}


def canonical(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names: list[str]) -> dict[str, str]:
    """Installed versions of these packages and all that they depend on here."""
    found, open_ends = {}, [(name, frozenset()) for name in names]
    seen = set(open_ends)
    while open_ends:
        name, extras = open_ends.pop()
        found[name] = distribution(name).version
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
            )
            step = (canonical(requirement.name), frozenset(requirement.extras))
            if applies and step not in seen:
                seen.add(step)
                open_ends.append(step)
    return found


@pytest.mark.parametrize("file", REQUIREMENTS)
def test_constraints_hold_the_requirements(file):
    """The files never ask for different versions."""
    constraints = pins("constraints.txt")
    for name, version in pins(file).items():
        assert constraints[name] == version, name


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the constraints are of Python 3.11")
@pytest.mark.parametrize("file", REQUIREMENTS)
def test_every_package_of_the_environment_is_pinned(file):
    """Also those that no file names: in three years they would be other ones."""
    constraints = pins("constraints.txt")
    try:
        installed = needed(list(pins(file)))
    except PackageNotFoundError as error:
        pytest.skip(f"{error} is not installed here")
    for name, version in installed.items():
        if not CUDA.match(name):
            assert constraints.get(name) == version.split("+")[0], name
