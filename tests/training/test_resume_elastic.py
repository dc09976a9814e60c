"""A job that resumes on another number of processes: same rows, same steps, another noise."""

import json
from pathlib import Path

import pytest

from tests.helpers.killable_runs import Run

RECORD = """
import json
def record(self, batch, *args):
    entry = {"step": self.global_step, "rows": batch["input_ids"].tolist()}
    with open(f"FOLDER/rows{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(entry) + chr(10))
before(Diffusion, "training_step", record)
"""


def rows_per_step(folder: Path) -> dict[int, list[tuple[int, ...]]]:
    """Sorted rows of each optimizer step, of all processes and starts."""
    found: dict[int, list] = {}
    for path in folder.glob("rows*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], []).extend(tuple(row) for row in entry["rows"])
    return {step: sorted(rows) for step, rows in found.items()}


@pytest.mark.slow
def test_one_two_one_processes_train_on_the_same_rows(tmp_path):
    """Epochs of four steps; the second start crosses into the second epoch with two processes."""
    changes = ["algo=mdlm", "loader.global_batch_size=88", "loader.eval_global_batch_size=4",
               "trainer.limit_val_batches=0"]  # fmt: skip
    straight, job = Run(tmp_path / "straight", *changes), Run(tmp_path / "job", *changes)
    straight.run("trainer.max_steps=7", preparation=RECORD.replace("FOLDER", str(straight.folder)))
    record = RECORD.replace("FOLDER", str(job.folder))
    for steps, how in (
        (3, ["loader.batch_size=44"]),
        (6, ["trainer.devices=2", "strategy=ddp", "loader.batch_size=22"]),
        (7, []),
    ):
        job.run(f"trainer.max_steps={steps}", *how, preparation=record)
    expected, found = rows_per_step(straight.folder), rows_per_step(job.folder)
    assert list(sorted(found)) == list(range(7))
    assert found == expected
    resume, reference = job.last()["resume"], straight.last()["resume"]
    assert resume["positions"] == reference["positions"]
    assert job.last()["global_step"] == 7
