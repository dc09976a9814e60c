"""`manifest.json`: what a run was made of, and each time it was started."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import lightning as L
import torch
from torch.utils.data import DataLoader

from corpora.row_datasets import PackedRows
from utils import file_exists, get_logger, json_text, write_text

logger = get_logger(__name__)

_PACKAGES = (
    "torch",
    "lightning",
    "torchmetrics",
    "torchdata",
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
)


class RunManifest(L.Callback):
    """Writes the manifest when training starts, and adds a line to its history at each start.

    Everything but the history describes the latest start; the history names commit, configuration
    and number of processes of each, so that a change between two shows.

    Args:
        path: of the file, any place fsspec reaches.
        run_config: the whole configuration.
    """

    def __init__(self, path: str, run_config: Mapping[str, Any]):
        self.path = path
        self.run_config = run_config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        commit, digest = git_commit(), config_hash(self.run_config)
        start = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": trainer.global_step,
            "host": socket.gethostname(),
            "world_size": trainer.world_size,
            "config_hash": digest,
            "git_commit": commit,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        manifest = {
            "command": sys.argv,
            "git_commit": commit,
            "versions": versions(),
            "config_hash": digest,
            "world_size": trainer.world_size,
            "num_nodes": trainer.num_nodes,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "device": device_name(pl_module.device),
            "data": {
                "train": describe_rows(trainer.train_dataloader),
                "valid": describe_rows(trainer.val_dataloaders),
            },
            "history": [*self._history(), start],
            "config": self.run_config,
        }
        write_text(self.path, json_text(manifest, indent=2) + "\n")

    def _history(self) -> list[dict[str, Any]]:
        if not file_exists(self.path):
            return []
        with fsspec.open(self.path, "rb") as file:
            content = file.read()
        try:
            return list(json.loads(content)["history"])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            # What a training leaves for people to read must not keep it from going on.
            logger.warning("%s is damaged (%s); its history begins anew", self.path, error)
            return []


def config_hash(run_config: Mapping[str, Any]) -> str:
    """Sixteen hex digits of a configuration."""
    text = json.dumps(run_config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_rows(loader: DataLoader | None) -> dict[str, Any] | None:
    """Number and hash of prepared rows; None of a stream, and where there is no loader."""
    rows = getattr(loader, "dataset", None)
    return {"rows": len(rows), "sha256": rows.sha256} if isinstance(rows, PackedRows) else None


def versions() -> dict[str, str | None]:
    """Of Python, the packages that decide a result, and CUDA."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found, "cuda": torch.version.cuda}


def device_name(device: torch.device) -> str:
    """What a device is sold as."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return platform.processor() or platform.machine()
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    return f"{names[0]} ({len(names)} threads)" if names else platform.machine()


def git_commit() -> str | None:
    """The project's commit, with `-dirty` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return None
