"""`scripts/log_sample_stats.py`: its numbers, its errors, and that it runs nothing it reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.sample_log import SampleRecord, append_samples
from scripts.log_sample_stats import main
from tests.helpers.places import PROJECT

ROW = '20.5,1024,5.25,1023,"a text",1\n'


@pytest.fixture
def logdir(tmp_path) -> Path:
    """Four samples, of which one has no perplexity."""
    records = [
        SampleRecord(
            samples="text", gen_ppl=ppl, gen_entropy=5.0, gen_lengths=length, gen_nfes=2 * length,
            gen_nfes_paper=length, seed=length % 2,
        )
        for ppl, length in [(10.0, 100), (20.0, 200), (60.0, 131_071), (None, 5)]
    ]  # fmt: skip
    append_samples(str(tmp_path / "run"), records)
    return tmp_path / "run"


def rows_of(printed: str) -> dict[str, list[str]]:
    """The cells of each row of a printed table by its first one."""
    lines = [line.strip("│\n").split("│") for line in printed.splitlines() if line[0] == "│"]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.parametrize("name", ["", "samples.csv", "samples.jsonl"])
def test_table(logdir, capsys, name):
    """Directory, CSV and JSON lines give the same numbers; a directory counts no sample twice."""
    assert main([str(logdir / name)]) == 0
    printed = capsys.readouterr().out
    assert "samples: 4, seeds: 2, files: 1" in " ".join(printed.split())
    rows = rows_of(printed)
    assert rows["generative perplexity"] == ["3", "30.00", "20.00", "15.28", "10.00", "60.00"]
    assert rows["entropy (nats)"] == ["4", "5.000", "5.000", "0.000", "5.000", "5.000"]
    assert rows["length (tokens)"][:3] == ["4", "32,844.0", "150.0"]
    assert rows["length (tokens)"][-1] == "131,071.0"
    assert rows["NFEs, every forward pass"][-1] == "262,142.0"
    assert rows["NFEs, the paper's count"][-1] == "131,071.0"


def test_a_file_of_the_original(tmp_path, capsys):
    """It has no header, so its first row is a sample, and no second count of forward passes."""
    path = tmp_path / "samples_genlen1024"  # the original's files have no suffix
    path.write_text(ROW * 2)
    assert main([str(path)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["generative perplexity"][:2] == ["2", "20.50"]
    assert rows["NFEs, the paper's count"] == ["0"] + ["-"] * 5


@pytest.mark.parametrize("column", range(6))
def test_cells_are_not_evaluated(tmp_path, capsys, column):
    """The original called `eval` on cells, which hold text that a model wrote."""
    cells = ["20.5", "1024", "5.25", "1023", "a text", "1"]
    cells[column] = f"[open({str(tmp_path / 'ran')!r}; 'w')]".replace(";", ",")
    (tmp_path / "samples.csv").write_text(",".join(f'"{cell}"' for cell in cells) + "\n")
    is_text = column == 4
    assert main([str(tmp_path)]) == (0 if is_text else 1)
    assert not (tmp_path / "ran").exists()
    if not is_text:
        assert f"{tmp_path}/samples.csv, line 1: " in capsys.readouterr().err


def test_names_are_not_markup(tmp_path, capsys):
    """A directory called [red] is printed as such."""
    (tmp_path / "[red]").mkdir()
    (tmp_path / "[red]/samples.csv").write_text(ROW)
    assert main([str(tmp_path / "[red]")]) == 0
    assert "[red]" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("content", "cause"),
    [(None, "no such file"), ("", "no samples"), (ROW + "1,2\n", "samples.csv, line 2: 2 cells")],
    ids=["missing", "empty", "broken"],
)
def test_a_bad_file_is_named_and_hides_no_other(tmp_path, logdir, capsys, content, cause):
    path = tmp_path / "samples.csv"
    if content is not None:
        path.write_text(content)
    assert main([str(path), str(logdir)]) == 1
    printed = capsys.readouterr()
    assert str(path) in printed.err and cause in printed.err and "Traceback" not in printed.err
    assert rows_of(printed.out)["generative perplexity"][0] == "3"


def test_runs_from_any_directory(tmp_path):
    (tmp_path / "samples.csv").write_text(ROW)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(PROJECT / "scripts/log_sample_stats.py"), "samples.csv"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout)["generative perplexity"][:2] == ["1", "20.50"]
