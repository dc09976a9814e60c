"""`scripts.frontier`: the grid, points that are kept, bad input, the table and the picture."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from matplotlib.image import imread

from corpora.tokenization import load_tokenizer
from diffusion import Diffusion
from evaluation.frontier import read_points
from evaluation.sample_log import read_samples
from sampling.options import SamplingOptions
from scripts import frontier, frontier_grid
from scripts.frontier_grid import content_hash, plan, split_grid
from tests.helpers.small_run import overrides

GRID = ("sampling.temperature=0.5,1", "sampling.tokens_per_step=1,2")


@pytest.fixture(scope="module")
def scorer(shared, tmp_path_factory):
    """A folder with the tiny GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-scorer")
    for part in ("data/tokenizers/gpt2", "golden/tiny-gpt2"):
        shutil.copytree(shared / part, folder, dirs_exist_ok=True)
    return folder


def write_checkpoint(config, path, *, seed=0):
    """Random weights of a model that has not been trained."""
    torch.manual_seed(seed)
    state = Diffusion(config, load_tokenizer("bytes")).state_dict()
    for name, value in state.items():
        if "linear" in name:
            value.normal_()
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)


@pytest.fixture(scope="module")
def checkpoint(compose, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "a.safetensors"
    write_checkpoint(compose(overrides(path.parent, "algo=bd3lm", "block_size=4")), path)
    return path


@pytest.fixture
def arguments(checkpoint, scorer, tmp_path, monkeypatch):
    """`arguments(*changes)`: a command line for a tiny model, three texts a point."""
    monkeypatch.chdir(tmp_path)
    small = overrides(tmp_path, "algo=bd3lm", "block_size=4", "eval.disable_ema=true")
    shutil.copy(checkpoint, "a.safetensors")

    def build(*changes, out="out"):
        return [
            "--out", out, *small, "loader.eval_batch_size=3", "sampling.min_entropy=null",
            f"{frontier_grid.SCORER}={scorer}", "eval.checkpoint_path=a.safetensors", *changes,
        ]  # fmt: skip

    return build


@pytest.fixture
def drawn(monkeypatch):
    """The grid of each point whose texts are drawn, in order."""
    calls, draw = [], frontier.draw_texts

    def counted(job, *args):
        calls.append({key.split(".")[1]: value for key, value in job.grid.items()})
        return draw(job, *args)

    monkeypatch.setattr(frontier, "draw_texts", counted)
    return calls


def fails(arguments):
    """What the command ends with: one line, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        frontier.main(arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# --- measuring --------------------------------------------------------------------------------


def test_a_stopped_grid_goes_on(arguments, drawn, tmp_path, capsys, caplog, monkeypatch):
    """Ctrl-C in the second point: the first is kept, and no point is measured twice."""
    monkeypatch.setattr(frontier.Console, "width", 200, raising=False)
    draw = frontier.draw_batches

    def stopped(*args, **kwargs):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(frontier, "draw_batches", stopped)
    with pytest.raises(SystemExit) as stop:
        frontier.main(arguments(*GRID))
    assert stop.value.code == 130 and "the same command goes on" in caplog.text
    assert len(read_points("out/points.jsonl")) == 1
    first = (tmp_path / "out/points.jsonl").read_text()

    monkeypatch.setattr(frontier, "draw_batches", draw)
    caplog.clear()
    with caplog.at_level("INFO"):
        frontier.main(arguments(*GRID))
    grid = [{"temperature": t, "tokens_per_step": n} for t in (0.5, 1) for n in (1, 2)]
    assert drawn == [*grid[:2], *grid[1:]]
    assert "1 of 4 points are measured already" in caplog.text
    assert "point 3 of 3: temperature=1, tokens_per_step=2, about " in caplog.text
    assert (tmp_path / "out/points.jsonl").read_text().startswith(first)

    points = read_points("out/points.jsonl")
    settings = [(p.settings["sampling.temperature"], p.settings["sampling.tokens_per_step"])
                for p in points]  # fmt: skip
    assert settings == [(0.5, 1), (0.5, 2), (1, 1), (1, 2)]
    assert all(p.num_texts == 3 and p.machine["torch"] == torch.__version__ for p in points)
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert [row[1:6:2] for row in table] == [
        ["0.5", "1", "3"], ["0.5", "2", "3"], ["1", "1", "3"], ["1", "2", "3"],
    ]  # fmt: skip
    assert imread(tmp_path / "out/frontier.png").shape[:2] == (572, 1320)

    changed = (tmp_path / "out/points.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(frontier, "read_weights", None)
    frontier.main(arguments(*GRID))
    assert len(drawn) == 5 and changed == (tmp_path / "out/points.jsonl").stat().st_mtime_ns


def test_a_point_is_the_mean_of_its_texts(arguments):
    """Means of e^nll and of entropies, their standard errors, and passes and tokens in all."""
    frontier.main(arguments("sampling.tokens_per_step=1,4"))
    for point in read_points("out/points.jsonl"):
        records = read_samples(f"out/{point.samples}/samples.jsonl")
        for name, mean, error in (
            ("gen_ppl", point.gen_ppl, point.gen_ppl_error),
            ("gen_entropy", point.entropy, point.entropy_error),
        ):
            values = torch.tensor([getattr(r, name) for r in records], dtype=torch.float64)
            assert mean == pytest.approx(values.mean().item(), rel=1e-12)
            assert error == pytest.approx((values.std() / 3**0.5).item(), rel=1e-9)
        # 31 tokens behind BOS; the block of BOS has three masks.
        passes = {1: 31, 4: 8}[point.settings["sampling.tokens_per_step"]]
        assert point.tokens_per_pass == pytest.approx(31 / passes)


@pytest.mark.slow
def test_what_has_changed_is_measured_again(arguments, tmp_path):
    """More texts, another seed or setting, other text in the same file of prompts."""
    (tmp_path / "prompts.txt").write_text("The old\n")
    changes = [
        [], ["sampling.num_sample_batches=2"], ["seed=2"], ["model.length=16"],
        ["sampling.kv_cache=true"], ["sampling.prompts=prompts.txt"], ["eval.disable_ema=false"],
    ]  # fmt: skip
    keys = [plan(arguments(*each)[2:])[0].key for each in changes]
    (tmp_path / "prompts.txt").write_text("My younger\n")
    keys.append(plan(arguments(*changes[5])[2:])[0].key)
    assert len(set(keys)) == 8
    same = arguments("sampling.logdir=elsewhere", "loader.num_workers=1", "sampling.live=true")
    assert plan(same[2:])[0].key == keys[0]


@pytest.mark.slow
def test_another_scorer_is_another_picture(arguments, drawn, scorer, tmp_path, caplog):
    """It has the same name and other files: points are measured again, and not drawn together."""
    frontier.main(arguments())
    shutil.copytree(scorer, tmp_path / "again")
    same = f"{frontier_grid.SCORER}=./again"
    frontier.main(arguments(same))
    assert len(drawn) == 1  # the files tell, not the place
    (tmp_path / "again/README.md").write_text("changed\n")
    with caplog.at_level("INFO"):
        frontier.main(arguments(same))
    assert len(drawn) == 2 and "1 points of other scorers" in caplog.text


# --- what is asked for ------------------------------------------------------------------------


def test_several_values_make_an_axis():
    """As Hydra spells them; a list in brackets is one value."""
    fixed, axes = split_grid([
        "block_size=4", "sampling.top_k=null,5", "sampling.stop_strings=[A,B]",
        "sampling.temperature=range(1,2,0.5)", "sampling.nucleus_rule=paper,standard",
    ])  # fmt: skip
    assert fixed == ["block_size=4", "sampling.stop_strings=[A,B]"]
    assert axes == {
        "sampling.top_k": [None, 5],
        "sampling.temperature": [1.0, 1.5],
        "sampling.nucleus_rule": ["paper", "standard"],
    }


def test_every_key_of_the_sampler_can_be_an_axis(arguments):
    """Those of `SamplingOptions`, so new ones too, and the steps of samplers on a time grid."""
    jobs = plan(arguments("sampling.first_hitting=false", "algo.T=8,16")[2:])
    assert [job.grid for job in jobs] == [{"algo.T": 8}, {"algo.T": 16}]
    assert [job.request.options.num_steps for job in jobs] == [8, 16]
    settings = jobs[0].settings
    names = SamplingOptions.__dataclass_fields__.keys() - {"num_steps", "decode"}
    assert {f"sampling.{name}" for name in names} <= settings.keys() - frontier_grid.NO_AXES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sampling.warmth=1,2"], "sampling.warmth: allowed with several values are algo.T, sam"),
        (["+sampling.warmth=1,2"], "sampling.warmth: allowed with several values are algo.T, sam"),
        (["sampling.warmth=1"], "Could not override 'sampling.warmth'"),
        (["seed=1,2"], "seed: allowed with several values are"),
        (["sampling.compile=true,false"], "sampling.compile: allowed with several values are"),
        (["sampling.temperature=1,-1"], "sampling.temperature=-1: allowed is a number in [0, inf)"),
        (["sampling.temperature=1,warm"], "sampling.temperature=warm: allowed"),
        (["sampling.tokens_per_step=1,2", "sampling.confidence_threshold=null,0.9"],
         "sampling.tokens_per_step=2: allowed with"),
        (["sampling.temperature=1,"], "sampling.temperature=1,: allowed is key=value as Hydra"),
        ([f"{frontier_grid.SCORER}=null"], "null: allowed is a model that scores"),
        (["sampling.prompts=nowhere.txt"], "nowhere.txt"),
    ],
)  # fmt: skip
def test_mistakes_at_any_point_are_found_before_anything_is_loaded(
    arguments, monkeypatch, changes, message
):
    """A value that the last of a dozen points refused cost the hours of the others."""
    monkeypatch.setattr(frontier, "read_weights", None)
    assert message in fails(arguments(*changes))


def test_files_that_are_not_there(arguments):
    assert "no such checkpoint" in fails(arguments("eval.checkpoint_path=./b.ckpt"))
    assert "cannot score samples" in fails(arguments(f"{frontier_grid.SCORER}=./nowhere"))


@pytest.mark.slow
def test_a_folder_is_of_one_checkpoint(arguments, compose, drawn, tmp_path):
    """Whatever it is called: points of two models in one picture would say nothing."""
    frontier.main(arguments())
    config = compose(arguments()[2:])
    write_checkpoint(config, tmp_path / "b.safetensors", seed=1)
    first, second = (content_hash(f"{name}.safetensors") for name in "ab")
    assert fails(arguments("eval.checkpoint_path=b.safetensors")) == (
        f"eval.checkpoint_path=b.safetensors ({second}): allowed with --out out is a.safetensors "
        f"({first}), of which its points are; another checkpoint needs another folder"
    )
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    frontier.main(arguments("eval.checkpoint_path=c.safetensors"))
    assert len(drawn) == 1


def test_a_folder_with_something_else_in_it(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/points.jsonl").write_text('{"key": 1}\n')
    assert "points.jsonl, line 1: no point of a frontier" in fails(arguments())
    (tmp_path / "file").touch()
    assert "file" in fails(arguments(out="file"))


def test_a_folder_is_written_by_one_command(arguments, monkeypatch, tmp_path):
    with frontier.sole_user(tmp_path / "out"):
        assert fails(arguments()).endswith(" is writing there")
    monkeypatch.setattr(frontier, "process_rank", lambda: (1, 4))
    assert "4 processes: allowed is 1" in fails(arguments())


def test_hashes(tmp_path):
    """Of names and contents; what is not there is a name on the Hub."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": "x"}))
    assert content_hash(str(tmp_path / "a")) == content_hash(str(tmp_path / "b"))
    (tmp_path / "b/config.json").rename(tmp_path / "b/other.json")
    assert content_hash(str(tmp_path / "a")) != content_hash(str(tmp_path / "b"))
    assert content_hash("owner/name") is None
