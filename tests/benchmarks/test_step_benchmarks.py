"""The benchmarks of whole steps: options, tables, JSON. What they measure is not tested."""

import json

import pytest
import torch

from benchmarks import comparison, eval, measure, scaling, train_step
from benchmarks.comparison import is_reference, jobs_of
from benchmarks.measure import JobFailed, Result
from benchmarks.steps import Job, evaluated_ranges, make_config, make_model, make_step
from losses.forward_process import FULL

TINY = (
    "model.hidden_size=32", "model.n_heads=2", "model.n_blocks=2", "model.cond_dim=16",
)  # fmt: skip


def result(seconds: float = 2.0, memory: float = 4000.0) -> Result:
    return Result(
        seconds=[seconds, seconds, 9 * seconds], losses=[10.0], memory_mb=memory,
        memory_before_mb=400.0, state_mb=2000.0, flops=3e12, peak_flops=1e13,
    )  # fmt: skip


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Makes results up instead of measuring them; the jobs that were asked for."""
    asked = []

    def measure_apart(job: Job, *, timeout: float | None = None) -> Result:
        asked.append(job)
        if job.length > 2048:
            raise JobFailed("exit code 1: too large")
        return result(12.0, 8000.0) if job.side == "reference" else result()

    monkeypatch.setattr(comparison, "measure_apart", measure_apart)
    monkeypatch.setattr(scaling, "measure_apart", measure_apart)
    return asked


class TestOptions:
    def test_defaults_are_the_documented_command(self):
        arguments = train_step.options(["--device", "cpu", "--against", "reference"])
        jobs = jobs_of(arguments, work="train")
        assert list(jobs) == ["bf16", "float32", "reference, float32"]
        job = jobs["bf16"]
        assert (job.algo, job.model, job.length, job.block_size) == ("bd3lm", "small", 1024, 16)
        assert (jobs["reference, float32"].side, job.side) == ("reference", "ours")

    def test_every_row_is_one_precision_on_one_backend(self):
        words = ["--precision", "bf16", "--attn-backend", "flex", "sdpa", "--compile"]
        words += ["--activation-checkpointing", "blocks", "--device", "cuda"]
        jobs = jobs_of(train_step.options(words), work="train")
        assert list(jobs) == ["bf16, flex", "bf16, sdpa"]
        assert {job.compiled for job in jobs.values()} == {"true"}
        assert {job.activation_checkpointing for job in jobs.values()} == {"blocks"}

    def test_rows_with_and_without_activation_checkpointing(self):
        words = ["--precision", "bf16", "float32", "--activation-checkpointing", "none", "blocks"]
        jobs = jobs_of(train_step.options(words), work="train")
        assert list(jobs) == ["bf16, none", "bf16, blocks", "float32, none", "float32, blocks"]
        assert jobs["float32, blocks"].activation_checkpointing == "blocks"

    def test_likelihoods_are_compared_with_one_draw(self):
        words = ["--precision", "float32", "--likelihood", "any_order", "nelbo"]
        jobs = jobs_of(eval.options(words), work="eval")
        assert list(jobs) == ["float32, any_order", "float32, nelbo"]
        found = [is_reference(job, jobs) for job in jobs.values()]
        assert found == [False, True]
        plain = jobs_of(eval.options(words[:2]), work="eval")
        assert not is_reference(plain["float32"], plain)

    def test_the_reference_runs_in_bf16_on_gpus(self):
        """As the original does, which has no autocast on a CPU."""
        words = ["--device", "cuda", "--against", "reference"]
        assert "reference, bf16" in jobs_of(train_step.options(words), work="train")

    @pytest.mark.parametrize("algo", ["ar", "mdlm", "sedd"])
    def test_others_than_bd3lm_have_one_block(self, algo):
        assert train_step.options(["--algo", algo]).block_size == 1024

    @pytest.mark.parametrize(
        ("main", "words", "message"),
        [
            (train_step, ["--algo", "mdlm", "--block-size", "4"], "mdlm has no blocks"),
            (train_step, ["--block-size", "5"], "no multiple"),
            (eval, ["--algo", "ar", "--search"], "allowed is bd3lm"),
            (scaling, ["--lengths", "100"], "no multiple of 16"),
            (scaling, ["--block-sizes", "3"], "no multiple of block size 3"),
        ],
    )
    def test_what_cannot_be_is_refused(self, capsys, main, words, message):
        with pytest.raises(SystemExit):
            main.options(words)
        assert message in capsys.readouterr().err


class TestTables:
    @pytest.mark.parametrize(("main", "extra"), [(train_step, []), (eval, ["--search"])])
    def test_ratios_and_json(self, made_up, tmp_path, capsys, main, extra):
        """The ratio is of medians; the JSON says where, when and how it came about."""
        path = tmp_path / "results" / "figures.json"
        words = ["--device", "cpu", "--against", "reference", "--rounds", "2", *extra]
        main.main([*words, "--json", str(path)])
        shown = capsys.readouterr().out
        assert "6.00" in shown and "0.50" in shown and "15%" in shown
        if main is eval:
            assert "200" in shown  # seconds of 100 batches
        record = json.loads(path.read_text())
        assert {"device", "torch", "python", "date", "command", "title"} <= set(record)
        assert [row["name"] for row in record["rows"]] == ["bf16", "float32", "reference, float32"]
        row = record["rows"][0]
        assert row["times_reference"] == 6 and row["memory_of_reference"] == 0.5
        assert row["passes_mb"] == 2000 and row["passes_of_reference"] == pytest.approx(1 / 3)
        assert row["tokens_per_second"] == 1024 and len(row["result"]["seconds"]) == 6
        assert [job.side for job in made_up] == 2 * ["ours", "ours", "reference"]

    def test_a_row_that_fails_is_named(self, made_up, capsys):
        train_step.main(["--device", "cpu", "--length", "4096", "--precision", "bf16"])
        assert "left out: exit code 1" in capsys.readouterr().err
        assert len(made_up) == 1  # and not tried again in the second round

    def test_scaling(self, made_up, tmp_path, capsys):
        """Lengths that fail are named, larger ones not tried; equal points are measured once."""
        files = [tmp_path / "s.json", tmp_path / "s.png"]
        scaling.main(["--device", "cpu", "--json", str(files[0]), "--picture", str(files[1])])
        shown = capsys.readouterr().out
        assert "left out: N = 4096: exit code 1" in shown
        assert "left out: N = 8192: a smaller one failed" in shown
        record = json.loads(files[0].read_text())
        assert {"device", "torch", "python", "date", "command", "title"} <= set(record)
        lengths = [row["length"] for row in record["rows"] if row["varies"] == "length"]
        assert lengths == [256, 512, 1024, 2048]
        assert len(made_up) == len(set(made_up))
        assert files[1].read_bytes().startswith(b"\x89PNG")

    def test_scaling_ends_in_time(self, made_up, capsys):
        scaling.main(["--device", "cpu", "--max-seconds", "0"])
        assert "left out: batch = 8: out of time" in capsys.readouterr().out
        assert not made_up


class TestMeasurement:
    @pytest.mark.parametrize("side", ["ours", "reference"])
    @pytest.mark.parametrize("work", ["train", "eval", "search"])
    def test_every_kind_of_step_runs(self, monkeypatch, work, side):
        """Steps without dropout and autocast have the same losses on both sides."""
        monkeypatch.setattr(measure, "matmul_peak", lambda *_, **__: 1.0)
        job = Job(
            work=work, side=side, model="tiny", length=16, block_size=4, batch_size=2,
            steps=2, overrides=(*TINY, "model.dropout=0"),
        )  # fmt: skip
        found = measure.measure(job)
        assert len(found.seconds) == len(found.losses) == 2
        assert found.memory_mb > 0 and found.flops > 0
        if side == "reference":
            ours = measure.measure(Job(**vars(job) | {"side": "ours"}))
            torch.testing.assert_close(found.losses, ours.losses, rtol=1e-4, atol=1e-4)

    def test_a_search_has_the_ranges_of_the_paper(self):
        """Five widths: 11 + 9 + 7 + 5 + 3 ranges, and the full one, which is reported."""
        for work, count in (("eval", 1), ("search", 36)):
            job = Job(work=work, side="ours", model="tiny", length=16, overrides=TINY)
            ranges = evaluated_ranges(make_model(job, make_config(job)))
            assert len(ranges) == count and ranges[0] == FULL


@pytest.mark.slow
def test_state_is_what_optimizer_and_average_hold():
    """The same for both sides."""
    for side in ("ours", "reference"):
        job = Job(work="train", side=side, length=32, overrides=TINY)
        config = make_config(job)
        model = make_model(job, config)
        weights = sum(p.numel() for p in model.parameters())
        assert make_step(job, config, model).state_mb == pytest.approx(3 * 4 * weights / 1e6)


def test_a_job_in_a_process_of_its_own():
    """The parent reads what the process found; one that fails has no result."""
    job = Job(work="train", side="ours", model="tiny", length=16, overrides=TINY)
    found = measure.measure_apart(job)
    assert len(found.seconds) == job.steps and found.peak_flops > 1e9
    for timeout, changes in ((None, {"algo": "none"}), (1e-3, {})):
        with pytest.raises(JobFailed):
            measure.measure_apart(Job(**vars(job) | changes), timeout=timeout)
