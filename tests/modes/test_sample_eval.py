"""What sample_eval reads and writes (the whole path is in test_end_to_end.py)."""

import json
import shutil

import pytest
import torch

from checkpointing.weights import Weights
from corpora.tokenization import load_tokenizer
from diffusion import Diffusion
from evaluation.generative_perplexity import ScorerUnavailableError
from evaluation.sample_log import SampleRecord, read_samples
from modes import sample_eval as sample_eval_module
from modes import starting_weights
from modes.sample_eval import sample_eval, summary
from tests.helpers.small_run import overrides

NO_SCORER = "eval.gen_ppl_eval_model_name_or_path=null"


@pytest.fixture
def small_run(compose, tmp_path, monkeypatch):
    """sample_eval of a random network: `small_run("sampling.kv_cache=true")`, the records."""
    monkeypatch.chdir(tmp_path)

    def run(*changes, rank=0, world_size=1):
        settings = ("mode=sample_eval", f"sampling.logdir={tmp_path}/log", "eval.disable_ema=true")
        config = compose(overrides(tmp_path, *settings, "algo=bd3lm", "block_size=4", *changes))

        def weights(_source):
            torch.manual_seed(0)
            state = Diffusion(config, load_tokenizer("bytes")).state_dict()
            for name, value in state.items():
                if "linear" in name:
                    value.normal_()
            return Weights("random", state)

        monkeypatch.setattr(sample_eval_module, "read_weights", weights)
        monkeypatch.setattr(sample_eval_module, "process_rank", lambda: (rank, world_size))
        sample_eval(config)
        log = tmp_path / "log" / "samples.jsonl"
        return read_samples(log) if log.exists() else []

    return run


def test_rows_of_batches_and_processes_are_the_same_rows(small_run, tmp_path):
    """Under srun every process drew the same samples; batch > 1 misaligned the rows."""
    sizes = ["sampling.num_sample_batches=4", "loader.eval_batch_size=2", NO_SCORER]
    for rank in range(2):
        small_run(*sizes, f"sampling.logdir={tmp_path}/shared", rank=rank, world_size=2)
    shared = read_samples(tmp_path / "shared" / "samples.jsonl")
    alone = small_run("sampling.num_sample_batches=1", "loader.eval_batch_size=8", NO_SCORER)
    assert sorted(r.extra["row"] for r in shared) == list(range(8))
    by_row = {r.extra["row"]: r.samples for r in shared}
    assert [by_row[i] for i in range(8)] == [r.samples for r in alone]
    assert len({r.samples for r in alone}) == 8


def test_cached_samples_are_the_same(small_run, tmp_path):
    plain = small_run("loader.eval_batch_size=3", NO_SCORER)
    logdir = f"sampling.logdir={tmp_path}/cached"
    small_run("loader.eval_batch_size=3", NO_SCORER, "sampling.kv_cache=true", logdir)
    cached = read_samples(tmp_path / "cached" / "samples.jsonl")
    assert [r.samples for r in cached] == [r.samples for r in plain]


def test_prompts_of_different_lengths_are_gone_on_from(small_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("The old\nA patient fisher\n")
    records = small_run(
        f"sampling.prompts={tmp_path}/prompts.txt", "sampling.max_new_tokens=5", NO_SCORER
    )
    assert [r.samples.startswith(f"[BOS]{r.extra['source']}") for r in records] == [True, True]
    assert [r.gen_lengths for r in records] == [1 + 7 + 5, 1 + 16 + 5]
    assert [r.extra["new_tokens"] for r in records] == [5, 5]
    assert [r.gen_nfes_paper for r in records] == [5, 5]


def test_gaps_are_filled_and_nothing_else(small_run, tmp_path):
    line = json.dumps({"text": "The [MASK:4] gate"})
    (tmp_path / "gaps.jsonl").write_text(line + "\n")
    (record,) = small_run(f"sampling.infill={tmp_path}/gaps.jsonl", NO_SCORER)
    assert record.samples.startswith("[BOS]The ") and record.samples.endswith(" gate")
    assert record.gen_lengths == 1 + 4 + 4 + 5 and record.gen_nfes_paper == 4


def test_gaps_look_ahead_with_particles(small_run, tmp_path):
    line = json.dumps({"text": "The [MASK:4] gate"})
    (tmp_path / "gaps.jsonl").write_text(line + "\n")
    infill = f"sampling.infill={tmp_path}/gaps.jsonl"
    keys = (infill, "sampling.infill_particles=3", "sampling.kv_cache=true", NO_SCORER)
    (record,) = small_run(*keys)
    assert record.samples.startswith("[BOS]The ") and record.samples.endswith(" gate")
    assert record.gen_lengths == 1 + 4 + 4 + 5 and record.gen_nfes_paper == 3 * (4 + 5)


def test_a_text_ends_with_its_stop_string(small_run, tmp_path):
    """Behind the prompt, which holds it too."""
    (tmp_path / "prompts.txt").write_text("a b\n")
    prompts = f"sampling.prompts={tmp_path}/prompts.txt"
    (free,) = small_run(prompts, NO_SCORER)
    written = free.samples.removeprefix("[BOS]a b")
    string = next(c for c in written[3:] if c.isascii() and c.isalnum())
    _, record = small_run(prompts, f"sampling.stop_strings=['{string}']", NO_SCORER)
    assert record.samples == "[BOS]a b" + written[: written.index(string) + 1]


def test_samples_are_written_although_the_scorer_is_missing(small_run, tmp_path):
    with pytest.raises(ScorerUnavailableError, match="null to skip generative perplexity"):
        small_run("eval.gen_ppl_eval_model_name_or_path=./nowhere", "loader.eval_batch_size=2")
    records = read_samples(tmp_path / "log" / "samples.jsonl")
    assert len(records) == 2 and all(r.gen_ppl is None for r in records)


def test_samples_are_scored(small_run, shared, tmp_path, monkeypatch):
    """By a model that is loaded once."""
    scorer = tmp_path / "scorer"
    shutil.copytree(shared / "data" / "tokenizers" / "gpt2", scorer)
    shutil.copytree(shared / "golden" / "tiny-gpt2", scorer, dirs_exist_ok=True)
    loaded, load = [], sample_eval_module.load_scorer
    monkeypatch.setattr(
        sample_eval_module, "load_scorer", lambda *a: loaded.append(load(*a)) or loaded[-1]
    )
    name = f"eval.gen_ppl_eval_model_name_or_path={scorer}"
    records = small_run(name, "loader.eval_batch_size=3", "sampling.num_sample_batches=2")
    assert len(loaded) == 1
    assert len(records) == 6 and all(r.gen_ppl > 1 and r.gen_entropy > 0 for r in records)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x" * 40, "has 41 tokens with BOS, allowed are fewer than model.length=32"),
        ("", "prompts.txt: the file is empty"),
        ("a [MASK:2] b", "belong in sampling.infill"),
    ],
)
def test_prompts_are_checked_before_the_model_is_loaded(
    content, message, compose, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise AssertionError("loaded before the check")

    monkeypatch.setattr(sample_eval_module, "read_weights", lambda _: Weights("a.ckpt", {}))
    monkeypatch.setattr(sample_eval_module, "load_model", fail)
    monkeypatch.setattr(sample_eval_module, "load_scorer", fail)
    (tmp_path / "prompts.txt").write_text(content)
    settings = ("mode=sample_eval", f"sampling.prompts={tmp_path}/prompts.txt")
    with pytest.raises(ValueError, match=message):
        sample_eval(compose(overrides(tmp_path, *settings)))


def test_a_file_in_place_of_the_log_is_found_before_the_model_is_loaded(
    compose, tmp_path, monkeypatch
):
    monkeypatch.setattr(sample_eval_module, "read_weights", None)
    (tmp_path / "log").write_text("")
    settings = ("mode=sample_eval", f"sampling.logdir={tmp_path}/log")
    with pytest.raises(OSError, match="log: cannot be written"):
        sample_eval(compose(overrides(tmp_path, *settings)))


def test_a_run_that_is_stopped_keeps_the_rows_already_written(small_run, tmp_path, monkeypatch):
    """Whole batches in both files, as if it had been asked for no more."""
    sizes = ("loader.eval_batch_size=2", NO_SCORER)
    small_run(*sizes, "sampling.num_sample_batches=2", f"sampling.logdir={tmp_path}/all")
    whole = read_samples(tmp_path / "all" / "samples.jsonl")
    draw = sample_eval_module.draw

    def stopped(*args, first_row, **kwargs):
        if first_row == 4:
            raise KeyboardInterrupt
        return draw(*args, first_row=first_row, **kwargs)

    monkeypatch.setattr(sample_eval_module, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        small_run(*sizes, "sampling.num_sample_batches=3", f"sampling.trace={tmp_path}/page.html")
    for name in ("samples.csv", "samples.jsonl"):
        records = read_samples(tmp_path / "log" / name)
        assert [r.samples for r in records] == [r.samples for r in whole]
    assert '"sample 4"' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("is_batch_job", [True, False])
def test_a_batch_job_has_a_line_per_batch(is_batch_job, small_run, monkeypatch, caplog):
    """Hours of sampling under sbatch said nothing; in a terminal there is the bar."""
    monkeypatch.setattr(sample_eval_module, "in_batch_job", lambda: is_batch_job)
    with caplog.at_level("INFO"):
        small_run("sampling.num_sample_batches=2", "loader.eval_batch_size=3", NO_SCORER)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("batch ")]
    assert [line.split(" in ")[0] for line in lines] == [
        "batch 1 of 2: 3 samples", "batch 2 of 2: 3 samples",
    ][: 2 * is_batch_job]  # fmt: skip


def test_rejected_samples_are_counted(small_run, monkeypatch, caplog):
    """Nothing told a user that what was printed had been rejected to the last."""
    monkeypatch.setattr(sample_eval_module, "suit_vocabulary", lambda options, **_: options)
    records = small_run(
        "model.length=256", "loader.eval_batch_size=2", "sampling.tokens_per_step=4", NO_SCORER,
        "sampling.min_entropy=9", "sampling.max_retries=1",
    )  # fmt: skip
    assert [r.extra["accepted"] for r in records] == [False, False]
    assert "2 of 2 samples have less than sampling.min_entropy=9 nats" in caplog.text
    assert [(r.gen_nfes, r.gen_nfes_paper) for r in records] == [(128, 64)] * 2


def test_another_block_size_is_an_error(compose, tmp_path, monkeypatch):
    """The weights fit any block size, and the text was silently worse."""
    size = ["algo=bd3lm", "block_size=4", "mode=sample_eval"]
    config = compose(overrides(tmp_path, *size))
    tokenizer = load_tokenizer("bytes")
    weights = Weights("a.ckpt", Diffusion(config, tokenizer).state_dict(), block_size=8)
    monkeypatch.setattr(starting_weights, "read_weights", lambda _source: weights)
    with pytest.raises(ValueError, match="block_size=4: allowed with this eval.* is 8"):
        starting_weights.load_model(config, tokenizer)
    anyway = compose(overrides(tmp_path, *size, "eval.any_block_size=true"))
    assert starting_weights.load_model(anyway, tokenizer).block_size == 4


def test_trace_replays_every_sample(small_run, tmp_path):
    """The page is there after each batch; its tokens join to the samples."""
    sizes = ("sampling.num_sample_batches=2", "loader.eval_batch_size=2", NO_SCORER)
    records = small_run(*sizes, f"sampling.trace={tmp_path}/page.html", "sampling.live=true")
    page = (tmp_path / "page.html").read_text()
    rows = json.loads(page.split('type="application/json">')[1].split("</script")[0])["rows"]
    assert [row["name"] for row in rows] == [f"sample {n}" for n in (1, 2, 3, 4)]
    assert [row["num_steps"] for row in rows] == [r.gen_nfes_paper for r in records]
    assert [len(row["tokens"]) for row in rows] == [r.gen_lengths for r in records]


def test_a_run_without_a_pass_divides_by_no_zero():
    """A gap of no token, say, which is refused earlier now."""
    shared = {"samples": "a", "gen_nfes": 0, "gen_lengths": 4, "seed": 1}
    found = summary([SampleRecord(extra={"new_tokens": 0}, **shared)], seconds=2.0)
    assert found["new tokens"] == 0 and "new tokens per pass" not in found


def test_a_sample_that_cannot_be_scored_does_not_spoil_the_mean():
    """The mean is over samples of e^nll, as published, not e to the mean nll."""
    extra = {"new_tokens": 3}
    shared = {"samples": "a", "gen_nfes": 2, "gen_lengths": 4, "seed": 1, "extra": extra}
    records = [SampleRecord(gen_ppl=ppl, **shared) for ppl in (10.0, float("nan"), 30.0)]
    found = summary(records, seconds=2.0)
    assert found["mean gen_ppl"] == 20.0 and found["new tokens per second"] == 9 / 2.0
    assert found["new tokens per pass"] == 9 / 6


@pytest.mark.parametrize("form", ["graphs", pytest.param("true", marks=pytest.mark.slow)])
def test_static_passes_give_the_same_text(small_run, form):
    """The float32 sums differ in their last bits alone, which no draw of these meets."""
    sizes = ("loader.eval_batch_size=2", "sampling.kv_cache=true", NO_SCORER)
    plain = small_run(*sizes)
    both = small_run(*sizes, f"sampling.compile={form}")  # to the same file
    compiled = both[len(plain) :]
    assert [r.samples for r in compiled] == [r.samples for r in plain]
    assert [r.gen_nfes for r in compiled] == [r.gen_nfes for r in plain]
