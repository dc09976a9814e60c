"""From text to weights, likelihood and samples, through `main.run`, for every algorithm."""

import csv
import json
from pathlib import Path

import pytest
import torch

from evaluation.sample_log import COLUMNS
from tests.helpers.small_run import ALGOS

RESULT_KEYS = {
    "val/nll", "val/ppl", "val/bpd", "num_tokens", "num_rows", "checkpoint", "config_hash",
}  # fmt: skip


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of the CSV log."""
    with (folder / "metrics/version_0/metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(folder) if row.get(name)]


def read_samples(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == COLUMNS
        return list(reader)


@pytest.mark.parametrize("algo", ALGOS)
def test_train_evaluate_sample(algo, run_main, tmp_path):
    """The whole path; likelihood of the average and of the raw weights differ."""
    first = run_main("train", *ALGOS[algo])
    checkpoints = {path.name for path in (first / "checkpoints").iterdir()}
    assert {"last.ckpt", "best.ckpt"} <= checkpoints and len(checkpoints) >= 4
    assert len(logged(first, "val/nll")) == 2 and len(logged(first, "trainer/loss")) == 4
    assert (first / "training_curve.png").stat().st_size > 1000

    checkpoint = "eval.checkpoint_path=train/checkpoints/last.ckpt"  # as seen from tmp_path
    second = run_main("ppl", *ALGOS[algo], "mode=ppl_eval", checkpoint)
    averaged = json.loads((second / "ppl_eval.json").read_text())
    assert set(averaged) >= RESULT_KEYS
    assert averaged["checkpoint"] == str(first / "checkpoints/last.ckpt")
    assert averaged["num_rows"] == 8, "two batches of four"
    assert averaged["num_tokens"] == 8 * 31, "position 0 is given"
    assert averaged["val/ppl"] == pytest.approx(2.718281828 ** averaged["val/nll"], rel=1e-4)
    assert averaged["val/nll"] == pytest.approx(logged(first, "val/nll")[-1], rel=1e-4)

    raw_path = tmp_path / "deep/raw.json"
    run_main("raw", *ALGOS[algo], "mode=ppl_eval", checkpoint,
             "eval.disable_ema=true", "eval.results_path=deep/raw.json")  # fmt: skip
    raw = json.loads(raw_path.read_text())
    assert not (tmp_path / "raw/ppl_eval.json").exists()
    assert abs(raw["val/nll"] - averaged["val/nll"]) > 1e-4
    assert raw["config_hash"] != averaged["config_hash"]

    third = run_main("sample", *ALGOS[algo], "mode=sample_eval", checkpoint, "seed=5",
                     "loader.eval_batch_size=3", "sampling.num_sample_batches=2", "algo.T=4",
                     "sampling.logdir=samples")  # fmt: skip
    rows = read_samples(third / "samples/samples.csv")
    assert len(rows) == 6 and len({row["samples"] for row in rows}) == 6
    for row in rows:
        assert "[MASK]" not in row["samples"] and row["samples"].startswith("[BOS]")
        assert row["gen_lengths"] == "32" and row["seed"] == "5"
        assert 0 < float(row["gen_entropy"]) < 3.5
        assert row["gen_nfes"] == ("5" if algo == "sedd" else "31")


def test_train_then_evaluate_then_sample_in_one_run(run_main):
    """`then` goes on with the checkpoint that has just been written."""
    folder = run_main("all", *ALGOS["bd3lm"], "then=[ppl_eval,sample_eval]", "trainer.max_steps=2")
    assert json.loads((folder / "ppl_eval.json").read_text())["checkpoint"].startswith(str(folder))
    assert len(list(folder.glob("samples_*/samples.csv"))) == 1


@pytest.mark.parametrize("first_hitting", [True, False])
def test_samples_append_and_keep_one_header(first_hitting, run_main, tmp_path):
    """The CSV header was never written; a second evaluation adds rows below the first.

    Ancestral sampling ended its grid before everything was revealed, and masks became token 0.
    """
    run_main("train", *ALGOS["bd3lm"], "trainer.max_steps=2")
    for seed in (1, 2):
        run_main(f"sample{seed}", *ALGOS["bd3lm"], "mode=sample_eval", f"seed={seed}", "algo.T=2",
                 "eval.checkpoint_path=train/checkpoints/last.ckpt", "loader.eval_batch_size=2",
                 f"sampling.first_hitting={first_hitting}",
                 f"sampling.logdir={tmp_path}/samples")  # fmt: skip
    rows = read_samples(tmp_path / "samples/samples.csv")
    assert [row["seed"] for row in rows] == ["1", "1", "2", "2"]
    assert not any("[MASK]" in row["samples"] for row in rows)


def assert_same(first: dict, second: dict) -> None:
    """Weights, moving average and optimizer state are equal bit by bit."""
    assert first["global_step"] == second["global_step"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
    assert first["ema"]["num_updates"] == second["ema"]["num_updates"]
    for one, other in zip(
        first["ema"]["shadow_params"], second["ema"]["shadow_params"], strict=True
    ):
        assert torch.equal(one, other)
    moments = [
        [state["exp_avg_sq"] for state in ckpt["optimizer_states"][0]["state"].values()]
        for ckpt in (first, second)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True))


RESUMED = {
    "ar": ALGOS["ar"],
    "bd3lm": [*ALGOS["bd3lm"], "training.resample=true"],
    "two epochs": ["algo=mdlm", "trainer.limit_train_batches=2"],
    "accumulating": ["algo=mdlm", "loader.batch_size=2"],
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_run_equals_an_uninterrupted_one(case, run_main, tmp_path):
    """Resuming restarted the data order, and the noise of the steps was another.

    Three steps, then on to six from last.ckpt: weights, average, optimizer and clipped range are
    those of six steps in a row.
    """
    settings = [*RESUMED[case], "callbacks.checkpoint_every_n_steps.every_n_train_steps=3"]
    straight = run_main("straight", *settings, "trainer.max_steps=6")
    run_main("begin", *settings, "trainer.max_steps=3", "checkpointing.save_dir=kept")
    run_main("resume", *settings, "trainer.max_steps=6", "checkpointing.save_dir=kept")
    first = load(straight / "checkpoints/last.ckpt")
    second = load(tmp_path / "kept/checkpoints/last.ckpt")
    assert_same(first, second)
    assert first["ema"]["num_updates"] == 6
    if case == "bd3lm":
        assert first["state_dict"]["sampling_eps_max"] - first["state_dict"]["sampling_eps_min"] < 1


def test_resuming_right_after_a_validation(run_main, tmp_path):
    """The step's checkpoint was older than its validation: the range that it found was lost."""
    settings = [*ALGOS["bd3lm"], "algo.clip_search_widths=[0.3]", "trainer.val_check_interval=3"]
    straight = run_main("straight", *settings, "trainer.max_steps=5")
    begun = run_main("begin", *settings, "trainer.max_steps=3", "checkpointing.save_dir=kept",
                     "callbacks.checkpoint_every_n_steps.every_n_train_steps=3")  # fmt: skip
    last = tmp_path / "kept/checkpoints/last.ckpt"
    assert load(last)["sampling_eps_min"] == pytest.approx(logged(begun, "sampling_eps_min")[-1])
    assert load(last)["sampling_eps_min"] > 0.1, "the search has found a range"
    resumed = run_main("resume", *settings, "trainer.max_steps=5", "checkpointing.save_dir=kept")
    assert_same(load(straight / "checkpoints/last.ckpt"), load(last))
    assert logged(resumed, "val/nll") == [], "the validation is not done twice"


def test_a_run_between_two_checkpoints_keeps_its_end(run_main, tmp_path):
    """A run shorter than the interval of checkpoints left nothing to evaluate or to resume."""
    settings = [*ALGOS["bd3lm"], "callbacks.checkpoint_every_n_steps.every_n_train_steps=500",
                "trainer.val_check_interval=500", "checkpointing.save_dir=kept"]  # fmt: skip
    last = tmp_path / "kept/checkpoints/last.ckpt"
    run_main("begin", *settings, "trainer.max_steps=1")
    assert load(last)["ema"]["num_updates"] == load(last)["global_step"] == 1
    run_main("resume", *settings, "trainer.max_steps=3")
    straight = [*settings, "trainer.max_steps=3", "checkpointing.save_dir=straight"]
    run_main("straight", *straight)
    assert_same(load(last), load(tmp_path / "straight/checkpoints/last.ckpt"))


def test_a_fresh_run_does_not_resume(run_main, tmp_path):
    """Without the switch, last.ckpt in save_dir is left alone."""
    settings = [*ALGOS["ar"], "trainer.max_steps=2", "checkpointing.save_dir=kept"]
    run_main("begin", *settings)
    again = run_main("again", *settings, "checkpointing.resume_from_ckpt=false")
    assert len(logged(again, "trainer/loss")) == 2


def test_fewer_batches_than_the_validation_interval(run_main):
    """A training set of fewer batches than `val_check_interval` ended in an error.

    The interval counts batches across epochs: epochs of three, validation after four and eight.
    """
    folder = run_main("train", *ALGOS["ar"], "trainer.limit_train_batches=3",
                      "trainer.val_check_interval=4", "trainer.max_steps=8")  # fmt: skip
    steps = [int(row["step"]) for row in metrics(folder) if row.get("val/nll")]
    assert steps == [3, 7], "counted from 0"
    assert [int(row["epoch"]) for row in metrics(folder) if row.get("val/nll")] == [1, 2]


def test_a_fraction_of_an_epoch_as_validation_interval(run_main):
    folder = run_main("train", *ALGOS["ar"], "trainer.limit_train_batches=4",
                      "trainer.val_check_interval=0.5", "trainer.max_steps=4")  # fmt: skip
    assert len(logged(folder, "val/nll")) == 2


def test_a_run_without_validation_and_with_nothing_to_log(run_main):
    """The curve of a run too short for a log entry is empty, not an error at its end."""
    folder = run_main("train", *ALGOS["ar"], "trainer.limit_val_batches=0", "trainer.max_steps=1",
                      "trainer.log_every_n_steps=50")  # fmt: skip
    assert (folder / "training_curve.png").exists()


def test_average_moves_once_per_optimizer_step(run_main):
    """Two batches make one step: three steps are three updates, not six."""
    folder = run_main("train", *ALGOS["mdlm"], "loader.batch_size=2", "trainer.max_steps=3",
                      "callbacks.checkpoint_every_n_steps.every_n_train_steps=3")  # fmt: skip
    checkpoint = load(folder / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == checkpoint["ema"]["num_updates"] == 3
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["ready"] == 6


def test_streaming_trains(run_main):
    """Streamed sets have no length, which ended training in an error. Resuming works too."""
    settings = [*ALGOS["bd3lm"], "data.streaming=true", "data.shuffle_buffer=8",
                "checkpointing.save_dir=kept"]  # fmt: skip
    first = run_main("train", *settings, "trainer.max_steps=2")
    assert len(logged(first, "trainer/loss")) == 2
    second = run_main("resume", *settings, "trainer.max_steps=4")
    assert [int(row["step"]) for row in metrics(second) if row["trainer/loss"]] == [2, 3]


def test_loader_processes_train(run_main):
    """One loading process; every other test has none, which the original could not do."""
    folder = run_main("train", *ALGOS["mdlm"], "loader.num_workers=1", "trainer.max_steps=2")
    assert len(logged(folder, "val/nll")) == 1


@pytest.mark.parametrize("noise", ["loglinear", "square", "square_root", "log", "cosine"])
def test_every_schedule_trains_and_evaluates(noise, run_main):
    """All schedules but loglinear crashed."""
    folder = run_main("train", *ALGOS["bd3lm"], f"noise={noise}", "trainer.max_steps=1",
                      "trainer.val_check_interval=1", "trainer.limit_val_batches=1")  # fmt: skip
    (nll,) = logged(folder, "val/nll")
    assert 0 < nll < 12, "near log 260 = 5.6"


def test_training_starts_from_pretrained_weights(run_main, tmp_path):
    """The first steps of a fine-tuning continue the weights, with the clipped range of its config.

    The average starts from them too; a range searched in the earlier run does not leak.
    """
    settings = [*ALGOS["bd3lm"], "algo.fix_clipping=true"]
    first = run_main("first", *settings, "training.sampling_eps_min=0.2")
    tuned = run_main("tuned", *settings, "training.sampling_eps_min=0.4",
                     "training.sampling_eps_max=0.9", "optim.lr=1e-12", "trainer.max_steps=2",
                     "training.from_pretrained=first/checkpoints/last.ckpt")  # fmt: skip
    start, end = load(first / "checkpoints/last.ckpt"), load(tuned / "checkpoints/last.ckpt")
    assert start["state_dict"]["sampling_eps_min"] == pytest.approx(0.2)
    assert end["state_dict"]["sampling_eps_min"] == pytest.approx(0.4)
    assert end["state_dict"]["sampling_eps_max"] == pytest.approx(0.9)
    name = "backbone.vocab_embed.embedding"
    torch.testing.assert_close(end["state_dict"][name], start["state_dict"][name])
    torch.testing.assert_close(end["ema"]["shadow_params"][0], end["state_dict"][name])
