"""The training script under a real Slurm: requeued twice, it ends where an undisturbed one does."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.places import PROJECT
from tests.helpers.slurm import NUM_GPUS, Slurm, wait_for
from tests.helpers.small_run import write_text

SCRIPT = PROJECT / "scripts/train/train_owt_bd3lm.sh"
MAX_STEPS = 160
# The real script, shrunk: its groups stay, its sizes go.
SHRUNK = [
    "data.tokenizer_name_or_path=bytes",
    "data.document=line",
    "data.insert_train_eos=True",
    "model=tiny",
    "model.hidden_size=32",
    "model.n_heads=2",
    "model.n_blocks=2",
    "model.cond_dim=16",
    "model.length=32",
    "model.attn_backend=sdpa",
    "training.from_pretrained=null",
    "algo.clip_search_widths=[0.5]",
    "loader.global_batch_size=4",
    "loader.batch_size=2",
    "loader.eval_global_batch_size=4",
    "loader.eval_batch_size=2",
    "loader.num_workers=1",
    "lr_scheduler.num_warmup_steps=10",
    "optim.lr=1e-2",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.precision=32",
    f"trainer.max_steps={MAX_STEPS}",
    "trainer.val_check_interval=40",
    "trainer.limit_val_batches=2",
    "trainer.num_sanity_val_steps=0",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=5",
    "logger=csv",
]


class Job:
    """A submitted training of the script on two tasks."""

    def __init__(self, slurm: Slurm, folder: Path):
        self.slurm, self.folder = slurm, folder
        self.directory = folder / "run"
        self.output = folder / "slurm.out"
        environment = slurm.environment | {
            "PYTHON": sys.executable, "BD3LM_CACHE": str(folder.parent / "cache"),
            "PRETRAIN_CKPT": "someone/model", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.id = slurm.run(
            "sbatch", "--parsable", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=1",
            f"--output={self.output}", str(SCRIPT), *SHRUNK,
            f"data.train_path={folder.parent}/train.txt",
            f"data.valid_path={folder.parent}/valid.txt",
            f"checkpointing.save_dir={self.directory}",
            f"hydra.run.dir={self.directory}",
            env=environment, cwd=folder,
        ).strip()  # fmt: skip

    @property
    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def step(self) -> int:
        """The step of the newest checkpoint."""
        names = [path.stem for path in self.directory.glob("checkpoints/*-*.ckpt")]
        return max((int(name.rpartition("-")[2]) for name in names), default=0)

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert self.state() in ("PENDING", "RUNNING", "COMPLETING"), self.printed
            return self.step() >= step

        wait_for(is_there, what=f"step {step}\n{self.printed}", seconds=120)

    def state(self) -> str:
        return self.slurm.job(self.id)["JobState"]

    def requeue(self) -> None:
        """As an operator, or a job of higher priority, does it."""
        self.slurm.run("scontrol", "requeue", self.id)
        self.start_again()

    def start_again(self) -> None:
        """Waits until the job is back in the queue, and has it begin."""
        wait_for(lambda: self.state() == "PENDING", what=f"requeue\n{self.printed}", seconds=60)
        # Slurm gives a requeued job two minutes before it starts again.
        self.slurm.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def finish(self) -> dict:
        """Waits for the end and returns the last checkpoint."""

        def has_ended() -> bool:
            state = self.state()
            assert state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), self.printed
            return state == "COMPLETED"

        wait_for(has_ended, what=f"the end\n{self.printed}", seconds=150)
        return torch.load(self.directory / "checkpoints/last.ckpt", weights_only=True)


def submit(slurm: Slurm, folder: Path) -> Job:
    folder.mkdir()
    return Job(slurm, folder)


def differences(one: dict, other: dict) -> list[str]:
    """Where the states of two checkpoints are not bit-equal."""
    optimizers = [state["optimizer_states"][0] for state in (one, other)]
    pairs = {
        f"weights {k}": (v, other["state_dict"][k]) for k, v in one["state_dict"].items()
    } | {
        f"average {i}": pair
        for i, pair in enumerate(
            zip(one["ema"]["shadow_params"], other["ema"]["shadow_params"], strict=True)
        )
    } | {
        f"optimizer {i} {k}": (v, optimizers[1]["state"][i][k])
        for i, values in optimizers[0]["state"].items()
        for k, v in values.items()
    }
    found = [name for name, (a, b) in pairs.items() if not torch.equal(a, b)]
    numbers = {
        "step": lambda state: state["global_step"],
        "updates of the average": lambda state: state["ema"]["num_updates"],
        "learning rate": lambda state: state["optimizer_states"][0]["param_groups"][0]["lr"],
        "schedule": lambda state: state["lr_schedulers"][0]["last_epoch"],
    }
    return found + [name for name, get in numbers.items() if get(one) != get(other)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(slurm, folder) -> dict:
    """The last checkpoint of a job that nothing happens to."""
    return submit(slurm, folder / "undisturbed").finish()


@pytest.mark.cluster
def test_a_job_that_is_requeued_twice_ends_like_one_that_is_not(slurm, folder, undisturbed):
    """The original began again in a fresh directory, with the data from the start."""
    requeued = submit(slurm, folder / "requeued")
    for restarts, step in enumerate((MAX_STEPS // 4, MAX_STEPS // 2), start=1):
        requeued.wait_for_step(step)
        requeued.requeue()
        assert requeued.step() < MAX_STEPS, "requeued while it trains"
        assert slurm.job(requeued.id)["Restarts"] == str(restarts)
    end = requeued.finish()
    assert end["global_step"] == MAX_STEPS
    assert differences(end, undisturbed) == []

    history = json.loads((requeued.directory / "manifest.json").read_text())["history"]
    assert [start["slurm_restarts"] for start in history] == [0, 1, 2]
    assert [start["step"] for start in history] == sorted({start["step"] for start in history})
    assert {start["slurm_job"] for start in history} == {requeued.id}
    assert {start["world_size"] for start in history} == {2}


@pytest.mark.cluster
def test_a_job_whose_time_is_up_saves_and_requeues_itself(slurm, folder, undisturbed):
    """SIGUSR1, for which the header of the script asks 90 s before the end. No step is repeated."""
    job = submit(slurm, folder / "time_is_up")
    job.wait_for_step(MAX_STEPS // 4)
    slurm.run("scancel", "--signal=USR1", job.id)
    job.start_again()
    assert slurm.job(job.id)["Restarts"] == "1"
    saved = torch.load(job.directory / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert differences(job.finish(), undisturbed) == []
    history = json.loads((job.directory / "manifest.json").read_text())["history"]
    assert [start["step"] for start in history] == [0, saved]
    assert saved < MAX_STEPS


@pytest.mark.cluster
def test_the_node_has_gpus_and_features(slurm):
    """What the scripts ask for is there: eight GPUs, and the kinds that users constrain to."""
    node = slurm.run("scontrol", "show", "node", "localhost")
    assert f"Gres=gpu:{NUM_GPUS}" in node and "AvailableFeatures=a5000,a6000,3090,a100" in node
