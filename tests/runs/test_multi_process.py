"""Two processes on the CPU, as on two GPUs: one run, each rank its own noise, every row once."""

import json
import os
import subprocess
import sys

import pytest
import torch

from configuration.data_request import data_request
from corpora.tokenization import load_tokenizer
from dataloader import get_dataloaders
from tests.helpers.small_run import ALGOS, overrides, write_text

# Runs main.py, and records what each rank draws in its training steps.
RECORDING = """
import json
from diffusion import Diffusion
from losses.token_losses import TokenLosses

training_step, mask = Diffusion.training_step, TokenLosses._sample_x_t
ranks = []  # the own one during a training step
def training_step_of_rank(self, batch, batch_idx):
    ranks.append(self.global_rank)
    loss = training_step(self, batch, batch_idx)
    ranks.clear()
    return loss
def record(self, x_0, **arguments):
    x_t = mask(self, x_0, **arguments)
    for rank in ranks:
        drawn = {"rank": rank, "rows": x_0.tolist(),
                 "masked": (x_t == self.denoiser.mask_index).tolist()}
        with open(f"RECORDS/rank{rank}.jsonl", "a") as file:
            file.write(json.dumps(drawn) + chr(10))
    return x_t
Diffusion.training_step, TokenLosses._sample_x_t = training_step_of_rank, record
with open("PROJECT/main.py") as file:
    exec(compile(file.read(), "PROJECT/main.py", "exec"))
"""


@pytest.fixture
def launch(project, tmp_path):
    """Runs the program on two processes in `tmp_path/run`."""
    write_text(tmp_path, num_valid=10)
    script = tmp_path / "recording.py"
    script.write_text(
        RECORDING.replace("RECORDS", str(tmp_path)).replace("PROJECT", str(project))
    )

    def run(*changes: str) -> str:
        done = subprocess.run(
            [sys.executable, str(script), *overrides(tmp_path, *changes),
             "trainer.devices=2", "strategy=ddp", f"hydra.run.dir={tmp_path}/run"],
            cwd=tmp_path, capture_output=True, text=True, timeout=400,
            env=os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def records(tmp_path, rank: int) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()]


def num_valid_rows(compose, tmp_path) -> int:
    _, loader = get_dataloaders(
        data_request(compose(overrides(tmp_path))), load_tokenizer("bytes"), skip_train=True
    )
    return len(loader.dataset)


@pytest.mark.slow
def test_two_processes_train_evaluate_and_sample(launch, compose, tmp_path):
    """All ranks shared one seed, and every one of them wrote samples of its own."""
    output = launch(*ALGOS["bd3lm"], "then=[ppl_eval,sample_eval]", "trainer.limit_val_batches=1.0",
                    "loader.eval_global_batch_size=6")  # fmt: skip
    first, second = (records(tmp_path, rank) for rank in (0, 1))
    assert len(first) == len(second) == 4
    for one, other in zip(first, second, strict=True):
        assert len(one["rows"]) == len(other["rows"]) == 2, "the global batch of 4 is shared"
        assert not {tuple(r) for r in one["rows"]} & {tuple(r) for r in other["rows"]}
        assert one["masked"] != other["masked"]

    run = tmp_path / "run"
    (results,) = run.rglob("ppl_eval.json")
    results = json.loads(results.read_text())
    assert results["num_rows"] == num_valid_rows(compose, tmp_path)
    assert results["num_rows"] % 2 == 1, "one rank has a row more"
    assert results["num_tokens"] == results["num_rows"] * 31
    assert len(list(run.rglob("samples.csv"))) == 1
    assert len(list(run.rglob("metrics.csv"))) == 1
    assert output.count("Everything is in") == 1
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == checkpoint["ema"]["num_updates"] == 4
