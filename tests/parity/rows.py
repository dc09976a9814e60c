"""What every check returns, and how differences are measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One comparison: `difference` may be at most `tolerance`. None: there is no check yet."""

    file: str
    compared: str
    difference: float | None
    tolerance: float | None

    @property
    def status(self) -> str:
        if self.difference is None or self.tolerance is None:
            return "not yet"
        # A NaN is not below any tolerance.
        return "ok" if self.difference <= self.tolerance else "NOT OK"


@dataclass(frozen=True)
class Golden:
    """A golden tensor file: its sizes and switches, and its tensors."""

    file: str
    meta: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def load_golden(path: Path) -> Golden:
    """Read a `.safetensors` file whose metadata hold a JSON string under `meta`."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return Golden(path.name, meta, {name: file.get_tensor(name) for name in file.keys()})


def absolute(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected|; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return (found.double() - expected.double()).abs().max().item()


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected| / |expected|; where zero is expected, |found|."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    scale = torch.where(expected == 0, 1.0, expected.abs())
    return ((found - expected).abs() / scale).max().item()


def relative_to_largest(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected| over the largest |expected|: for sums that cancel (gradients)."""
    return absolute(found, expected) / expected.double().abs().max().item()


def count_different(found: Tensor, expected: Tensor) -> float:
    """Number of unequal entries; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found != expected).sum())
