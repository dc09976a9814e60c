"""The paper's recipe: weights trained at L' = N go on as block diffusion at a smaller L'."""

import csv
from pathlib import Path

import pytest
import torch

from checkpointing.convert import main as convert
from diffusion import Diffusion

# What trains the weights.
PRETRAINED = {
    "mdlm": ["algo=mdlm"],
    "bd3lm at L' = N": ["algo=bd3lm", "block_size=32"],
}
BLOCKS = ["algo=bd3lm", "block_size=4", "algo.clip_search_widths=[0.5]", "training.resample=true"]
RANGE = ["training.sampling_eps_min=0.4", "training.sampling_eps_max=0.9", "algo.fix_clipping=true"]


@pytest.fixture
def run(run_main, monkeypatch):
    """`run("name", "key=value", ...)`: a training's directory, and the rows that it saw."""

    def run_in(name: str, *changes: str) -> tuple[Path, list]:
        seen = []
        step = Diffusion.training_step

        def recorded(self, batch, batch_idx):
            seen.append(batch["input_ids"].tolist())
            return step(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(Diffusion, "training_step", recorded)
            return run_main(name, *changes), seen

    return run_in


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("form", ["checkpoint", "hub", "safetensors"])
@pytest.mark.parametrize("pretrained", PRETRAINED)
def test_smaller_blocks_from_pretrained_weights(pretrained, form, run, tmp_path):
    """Weights, average and range begin where they should, and the data at its first row.

    The learning rate is so small that the end of the fine-tuning shows its beginning.
    """
    first, _ = run("first", *PRETRAINED[pretrained])
    start = last(first)
    source, weights = "first/checkpoints/last.ckpt", start["state_dict"]
    if form != "checkpoint":
        source = {"hub": "published", "safetensors": "published.safetensors"}[form]
        assert convert([f"{first}/checkpoints/last.ckpt", str(tmp_path / source)]) == 0
        names = [name for name in weights if "inv_freq" not in name and "eps" not in name]
        weights = dict(zip(names, start["ema"]["shadow_params"], strict=True))
    tuned, seen = run("tuned", *BLOCKS, *RANGE, "optim.lr=1e-12",
                      f"training.from_pretrained={source}")  # fmt: skip
    end = last(tuned)

    assert end["global_step"] == 4, "a training of its own, not a resumed one"
    for name in weights:
        if "eps" not in name:
            torch.testing.assert_close(end["state_dict"][name], weights[name], msg=name)
    names = [k for k in end["state_dict"] if "inv_freq" not in k and "eps" not in k]
    for name, average in zip(names, end["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(average, weights[name], msg=name)
    assert end["state_dict"]["sampling_eps_min"] == pytest.approx(0.4)
    assert end["state_dict"]["sampling_eps_max"] == pytest.approx(0.9)

    _, rows_of_a_new_run = run("new", *BLOCKS)
    assert seen == rows_of_a_new_run, "the rows that the weights have seen are not skipped"


def test_a_resumed_fine_tuning_leaves_the_pretrained_weights(run, tmp_path):
    """The same command goes on, also where the pretrained weights have gone since."""
    first, _ = run("first", "algo=mdlm")
    command = [*BLOCKS, "training.from_pretrained=first/checkpoints/last.ckpt",
               "checkpointing.save_dir=kept"]  # fmt: skip
    run("half", *command, "trainer.max_steps=2")
    (first / "checkpoints" / "last.ckpt").unlink()
    _, seen = run("whole", *command, "trainer.max_steps=4")
    assert len(seen) == 2
    _, of_a_new_run = run("new", *BLOCKS)
    assert seen == of_a_new_run[2:]


@pytest.mark.slow
def test_the_originals_weights_are_a_head_start(run, shared, tmp_path):
    """The original's MDLM checkpoint, fine-tuned at L' = 4, is ahead of a training from scratch."""
    text = (shared / "data/text8/text8.prefix742809").read_text()
    (tmp_path / "train.txt").write_text(text[:600_000])
    (tmp_path / "valid.txt").write_text(text[600_000:620_000])
    keys = [
        *BLOCKS, "data.document=file", "data.tokenizer_name_or_path=text8", "model.length=64",
        "model.hidden_size=64", "model.n_heads=4", "model.n_blocks=3",
        "loader.global_batch_size=32",
        "+data.insert_train_special=false", "+data.insert_valid_special=false", "optim.lr=3e-4",
        "trainer.max_steps=60", "trainer.val_check_interval=60", "trainer.limit_val_batches=20",
        "training.ema=0.9", "callbacks.checkpoint_every_n_steps.every_n_train_steps=60",
    ]  # fmt: skip
    source = shared / "golden" / "lightning" / "mdlm_text8.ckpt"
    tuned, _ = run("tuned", *keys, f"training.from_pretrained={source}")
    scratch, _ = run("scratch", *keys)
    assert validated(tuned) < validated(scratch) - 0.1


def validated(folder: Path) -> float:
    with (folder / "metrics/version_0/metrics.csv").open(newline="") as file:
        (nll,) = [float(row["val/nll"]) for row in csv.DictReader(file) if row.get("val/nll")]
    return nll
