"""A run small enough for a test: a page of English, a network of two narrow layers, the CPU."""

import itertools
from pathlib import Path

_WHO = ("The old gardener", "A patient fisherman", "My younger sister", "The night watchman")
_WHAT = ("waters the roses", "mends the torn net", "counts the bright stars", "opens the gate")
_WHERE = ("behind the mill", "near the quiet harbour", "under the stone bridge")
_WHY = ("because the rain is late", "and hums a slow song", "before anyone wakes")


def sentences() -> list[str]:
    """144 different sentences of English."""
    return [f"{' '.join(parts)}.\n" for parts in itertools.product(_WHO, _WHAT, _WHERE, _WHY)]


def write_text(folder: Path, *, num_valid: int = 12) -> None:
    """Writes train.txt, one sentence per line, and valid.txt, every twelfth of them."""
    lines = sentences()
    valid = lines[:: len(lines) // num_valid]
    (folder / "train.txt").write_text("".join(line for line in lines if line not in valid))
    (folder / "valid.txt").write_text("".join(valid))


def overrides(folder: Path, *changes: str) -> list[str]:
    """Overrides of a run on the text of `write_text`: rows of 32 bytes, batches of four."""
    return [
        "data=local",
        f"data.train_path={folder}/train.txt",
        f"data.valid_path={folder}/valid.txt",
        f"data.cache_dir={folder}/cache",
        "data.document=line",
        "data.tokenizer_name_or_path=bytes",
        "model=tiny",
        "model.hidden_size=32",
        "model.n_heads=2",
        "model.n_blocks=2",
        "model.cond_dim=16",
        "model.length=32",
        "loader.global_batch_size=4",
        "loader.num_workers=0",
        "lr_scheduler.num_warmup_steps=1",
        "optim.lr=1e-2",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.precision=32",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=2",
        "trainer.num_sanity_val_steps=0",
        "trainer.log_every_n_steps=1",
        "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
        "eval.gen_ppl_eval_model_name_or_path=null",
        "wandb=null",
        *changes,
    ]


ALGOS = {
    "ar": ["algo=ar"],
    "bd3lm": ["algo=bd3lm", "block_size=4", "algo.clip_search_widths=[0.5]"],
    "mdlm": ["algo=mdlm"],
    "sedd": ["algo=sedd"],
}
