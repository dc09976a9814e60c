"""The Lightning module in a size for tests, on rows made of random letters."""

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from corpora.tokenization import load_tokenizer
from diffusion import Diffusion
from tests.helpers.references import generator
from tests.helpers.small_run import overrides

# A small vocabulary and rows of 16 keep each step at a few milliseconds.
SMALL = ["data.tokenizer_name_or_path=text8", "model.length=16", "model.dropout=0.0"]


def module(compose, folder, *changes: str) -> Diffusion:
    """A module whose weights are not zero: fresh ones predict the same everywhere."""
    L.seed_everything(0, verbose=False)
    config = compose(overrides(folder, *SMALL, *changes))
    model = Diffusion(config, load_tokenizer("text8"))
    model.composed = config  # for tests alone: interpolations and all
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(1)))
    return model


def batches(count: int, *, batch_size: int = 4, seed: int = 0) -> DataLoader:
    """Batches of random letters, {input_ids, attention_mask}."""
    ids = torch.randint(8, 35, (count, batch_size, 16), generator=generator(seed))
    rows = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    return DataLoader(rows, batch_size=None)


def trainer(tmp_path, *, callbacks=(), steps=4, **settings) -> tuple[L.Trainer, "Memory"]:
    """A trainer that validates after every two steps, and what it will have logged."""
    memory = Memory()
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_steps": steps, "logger": memory,
        "log_every_n_steps": 1, "val_check_interval": 2, "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": tmp_path,
        "callbacks": list(callbacks),
    }  # fmt: skip
    return L.Trainer(**(defaults | settings)), memory


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self):
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    @property
    def names(self) -> set[str]:
        return {name for _, row in self.rows for name in row}

    def values(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]
