"""DDP and FSDP on two processes: the same training as one process with twice the batch.

The runs use the noise of `parallel_runs.noise_of_rows`, so that a row costs the same wherever it is
computed, and dropout is off. 21 validation rows make 6 batches on one process and 5 on the other.
"""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.helpers import parallel_runs
from tests.helpers.small_run import ALGOS, write_text

NUM_VALID_ROWS = 21
# Adam divides by the root of the squared gradient: with a tiny eps it turns the rounding of
# vanishing gradients into steps of full length.
COMMON = [
    *ALGOS["bd3lm"],
    "model.dropout=0",
    "training.antithetic_sampling=false",  # strata reach over the rows of a batch
    "optim.eps=1e-3",
    "trainer.gradient_clip_val=0.1",
    "trainer.limit_val_batches=1.0",
    "trainer.num_sanity_val_steps=1",
]
# An interval counts batches, not optimizer steps.
ACCUMULATED = ["loader.batch_size=1", "trainer.val_check_interval=4"]
HALF = ["trainer.max_steps=2"]
LAST = "checkpoints/last.ckpt"

pytestmark = pytest.mark.xdist_group("strategies")  # one process makes the runs for all


def resumed(folder: Path, name: str) -> list[str]:
    return [f"checkpointing.resume_ckpt_path={folder}/{name}/{LAST}"]


def at_url(folder: Path, name: str) -> list[str]:
    return [f"checkpointing.save_dir=file://{folder}/{name}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs, by the names of their directories."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder, num_valid=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a run changes the directory; this puts it back

        def alone(name: str, *changes: str) -> None:
            parallel_runs.run(folder, name, [*COMMON, *changes])

        alone("one")
        alone("one_half", *HALF)
        pairs = {
            "ddp": [],
            "accumulated": ACCUMULATED,
            "unclipped": ["trainer.gradient_clip_val=null"],
            "ddp_half": HALF,
            "ddp_from_one": resumed(folder, "one_half"),
            "fsdp": ["strategy=fsdp", "then=[ppl_eval,sample_eval]"],
            "fsdp_accumulated": ["strategy=fsdp", *ACCUMULATED],
            "ddp_bf16": ["trainer.precision=bf16"],
            "fsdp_bf16": ["strategy=fsdp", "trainer.precision=bf16"],
            "fsdp_half": ["strategy=fsdp", *HALF],
            "fsdp_from_one": ["strategy=fsdp", *resumed(folder, "one_half")],
            "drawn": [],
            "drawn_again": [],
            "drawn_otherwise": ["seed=2"],
            "nan": [],
            "fsdp_from_fsdp": ["strategy=fsdp", *resumed(folder, "fsdp_half")],
            # The same command twice: the second run goes on from what is at the first one's URL.
            "fsdp_url_half": ["strategy=fsdp", *at_url(folder, "fsdp_url"), *HALF],
            "fsdp_url": ["strategy=fsdp", *at_url(folder, "fsdp_url")],
            "ddp_url_half": [*at_url(folder, "ddp_url"), *HALF],
            "ddp_url": at_url(folder, "ddp_url"),
        }
        changes = {name: [*COMMON, *more] for name, more in pairs.items()}
        (folder / "printed.json").write_text(
            json.dumps(parallel_runs.start_pair(folder, changes))
        )
        parallel_runs.start_pair(folder, {"two_nodes": COMMON}, nodes=2)
        alone("one_from_ddp", *resumed(folder, "ddp_half"))
        alone("one_from_fsdp", *resumed(folder, "fsdp_half"))
    return folder


def checkpoint(folder: Path, name: str) -> dict:
    return torch.load(folder / name / LAST, weights_only=True)


def tensors(state: dict) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer state of a checkpoint by name."""
    found = {f"weights {name}": tensor for name, tensor in state["state_dict"].items()}
    found |= {f"average {i}": tensor for i, tensor in enumerate(state["ema"]["shadow_params"])}
    for index, values in state["optimizer_states"][0]["state"].items():
        found |= {f"optimizer {index} {name}": tensor for name, tensor in values.items()}
    return found


def assert_close(folder: Path, name: str, expected: str) -> None:
    actual, wanted = tensors(checkpoint(folder, name)), tensors(checkpoint(folder, expected))
    assert list(actual) == list(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(actual[key], tensor, rtol=0, atol=1e-6, msg=f"{name}: {key}")


def logged(folder: Path, name: str) -> dict[str, list[float]]:
    """Every logged number that depends on data and weights, by its name."""
    (path,) = (folder / name).glob("metrics/*/metrics.csv")
    found: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key.startswith(("trainer/loss", "train/nll", "val", "sampling_eps")):
                    found.setdefault(key, []).append(float(value))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "accumulated", "fsdp", "fsdp_accumulated"])
def test_two_processes_train_like_one_with_twice_the_batch(folder, name):
    """Weights, average and optimizer state, with gradients clipped by their norm over all."""
    assert_close(folder, name, "one")
    expected = checkpoint(folder, "one")
    assert checkpoint(folder, name)["global_step"] == expected["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["", "_bf16"])
def test_fsdp_trains_like_ddp(folder, precision):
    """In mixed bf16 too: weights are sent and summed in float32."""
    assert_close(folder, f"fsdp{precision}", f"ddp{precision}")


@pytest.mark.slow
def test_two_nodes_train_like_one_with_two_devices(folder):
    """Global batch, ranks and rows are those of all nodes."""
    one, two = (tensors(checkpoint(folder, name)) for name in ("ddp", "two_nodes"))
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items())


@pytest.mark.slow
def test_clipping_bites(folder):
    """Lightning's FSDPStrategy refuses to clip by norm; the runs above would not differ if not."""
    clipped, free = (tensors(checkpoint(folder, name)) for name in ("ddp", "unclipped"))
    key = "weights backbone.output_layer.linear.bias"
    assert (clipped[key] - free[key]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_each_validation_row_counts_once(folder, name):
    """One process has a batch more: likelihood, number of rows and the search are those of one.

    With sharded weights the other process would have left it waiting for its part of them.
    """
    expected, actual = logged(folder, "one"), logged(folder, name)
    assert set(expected["val/rows"]) == {NUM_VALID_ROWS}
    assert any(key.startswith("valid_var_") for key in expected)
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        # The mean over each process's batches of the epoch is of batches of unequal size.
        assert actual[key] == pytest.approx(values, rel=2e-6), key


@pytest.mark.slow
def test_checkpoints_are_whole_and_alike(folder):
    """The file of sharded weights is that of any other run: names, order, shapes, plain tensors."""
    one, sharded = checkpoint(folder, "one"), checkpoint(folder, "fsdp")
    for state in (one, sharded):
        assert all(type(tensor) is torch.Tensor for tensor in tensors(state).values())
    assert [(k, v.shape, v.dtype) for k, v in tensors(one).items()] == [
        (k, v.shape, v.dtype) for k, v in tensors(sharded).items()
    ]
    groups = [state["optimizer_states"][0]["param_groups"] for state in (one, sharded)]
    assert groups[0] == groups[1]
    assert sharded["ema"]["num_updates"] == one["ema"]["num_updates"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ddp_from_one", "fsdp_from_one", "fsdp_from_fsdp", "one_from_ddp", "one_from_fsdp"]
)
def test_a_run_goes_on_with_another_strategy(folder, name):
    """Two steps there and two here are the four steps of one run."""
    assert_close(folder, name, "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp_url", "fsdp_url"])
def test_a_run_goes_on_from_a_url(folder, name):
    """Lightning takes `file://...` for a relative path, where no later run would look."""
    assert_close(folder, name, "one")
    history = json.loads((folder / name / "manifest.json").read_text())["history"]
    assert [start["step"] for start in history] == [0, 2]


@pytest.mark.slow
def test_fsdp_evaluates_and_samples(folder):
    results = json.loads((folder / "fsdp/ppl_eval.json").read_text())
    assert results["num_rows"] == NUM_VALID_ROWS
    assert results["val/nll"] == pytest.approx(logged(folder, "one")["val/nll"][-1], rel=1e-6)
    (path,) = (folder / "fsdp").rglob("samples.csv")
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2, "one batch, and a process without any"


@pytest.mark.slow
def test_seed_and_number_of_processes_decide_the_noise(folder):
    """test_multi_process.py tells that each process has its own."""
    drawn, again, otherwise = (
        tensors(checkpoint(folder, name)) for name in ("drawn", "drawn_again", "drawn_otherwise")
    )
    assert all(torch.equal(again[key], tensor) for key, tensor in drawn.items())
    key = "weights backbone.output_layer.linear.bias"
    assert not torch.equal(drawn[key], otherwise[key])


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_all_processes(folder):
    """The process that had it keeps its batch; the other one would wait for gradients forever."""
    errors = [(folder / f"nan/error{rank}.txt").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "at batch 1 of process 1, before step 2" in errors[0]
    assert [path.name for path in (folder / "nan").glob("*.pt")] == ["nonfinite_rank1.pt"]


@pytest.mark.slow
def test_the_first_process_speaks(folder):
    first, second = json.loads((folder / "printed.json").read_text())
    assert "M parameters" in first and "Everything is in" in first and "val/nll" in first
    for text in ("M parameters", "Everything is in", "Likelihood of"):
        assert text not in second
