"""SSD-LM's command lines: samples, scores, bad input, and the batch script."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import generate_text
import pytest
import report_genppl

from corpora.tokenization import byte_tokenizer
from tests.helpers.places import PROJECT

FOLDER = PROJECT / "ssd-lm"
BATCH_SCRIPT = FOLDER / "run_generate_text_batch.sh"
SCRIPTS = ("generate_text.py", "report_genppl.py")
TINY_FLAGS = ["--length", "10", "--block_size", "5", "--T", "2", "--device", "cpu"]


def generate(model: Path, output: Path, *flags: str) -> dict:
    """Run generate_text.py here; returns what it wrote."""
    arguments = ["--model", str(model), "--output", str(output), *TINY_FLAGS, *flags]
    assert generate_text.main(arguments) == 0
    return json.loads(output.read_text())


PAGES = [PROJECT / "docs/paper.md", FOLDER / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=["docs", "own"])
def test_commands_of_the_pages(page, tmp_path, monkeypatch):
    """Every command is accepted as it stands."""
    monkeypatch.chdir(tmp_path)
    parsers = {"generate_text": generate_text, "report_genppl": report_genppl}
    found = re.findall(r"^python ssd-lm/(\w+)\.py (.*)$", page.read_text(), flags=re.MULTILINE)
    assert {script for script, _ in found} == set(parsers)
    for script, arguments in found:
        parsers[script].parse_arguments(shlex.split(arguments))


def test_readme_lists_every_option(tmp_path, monkeypatch):
    """The table has the options that there are, with their defaults."""
    monkeypatch.chdir(tmp_path)
    options = vars(generate_text.parse_arguments([])) | {"device": "auto"}
    table = (FOLDER / "README.md").read_text().split("\n| option |")[1].split("\n\n")[0]
    cells = [line.split("|") for line in table.splitlines()[2:]]
    found = {name: row[2] for row in cells for name in re.findall(r"`--(\w+)`", row[1])}
    assert set(found) == set(options)
    for name, default in options.items():
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert default is None or shown in found[name], name


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_anywhere(tmp_path, script):
    """Each finds the project's modules by itself."""
    result = subprocess.run(
        [sys.executable, str(FOLDER / script), "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--device" in result.stdout


def test_generate_and_report(tiny, scorer, tmp_path, capsys):
    """Samples, settings and scores, in JSON; a sample does not depend on the batch size."""
    path = tmp_path / "new" / "samples.json"
    content = generate(tiny, path, "--num_samples", "3", "--batch_size", "2", "--seed", "4")
    assert content["settings"]["seed"] == 4 and content["settings"]["T"] == 2
    tokenizer = byte_tokenizer()
    for index, sample in enumerate(content["samples"]):
        assert (sample["index"], len(sample["tokens"]), sample["nfe"]) == (index, 10, 4)
        assert sample["text"] == tokenizer.decode(sample["tokens"], skip_special_tokens=True)
    alone = generate(tiny, tmp_path / "alone.json", "--num_samples", "3", "--batch_size", "1",
                     "--seed", "4")  # fmt: skip
    assert alone == content
    for flags in (["--seed", "5"], ["--seed", "4", "--precision", "bfloat16"]):
        other = generate(tiny, tmp_path / f"{flags[-1]}.json", "--num_samples", "3", *flags)
        assert other["samples"] != content["samples"]

    assert report_genppl.main([str(path), "--scorer", str(scorer), "--device", "cpu"]) == 0
    report = json.loads(path.with_suffix(".genppl.json").read_text())
    perplexities = [sample["gen_ppl"] for sample in report["samples"]]
    assert report["num_samples"] == report["num_scored"] == 3 and report["gen_nfes"] == 4
    assert report["gen_ppl"] == pytest.approx(sum(perplexities) / 3)
    assert report["gen_ppl_standard_error"] > 0
    assert "generative perplexity" in capsys.readouterr().out


def test_a_stopped_run_goes_on(tiny, tmp_path, monkeypatch):
    """What was written stays, and the same command draws the rest as if nothing had happened."""
    expected = generate(tiny, tmp_path / "whole.json", "--num_samples", "3", "--batch_size", "1")
    path, draw = tmp_path / "stopped.json", generate_text.draw

    def stops_at_the_third(model, *, indices, **options):
        if 2 in indices:
            raise KeyboardInterrupt
        return draw(model, indices=indices, **options)

    monkeypatch.setattr(generate_text, "draw", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny, path, "--num_samples", "3", "--batch_size", "1")
    assert json.loads(path.read_text())["samples"] == expected["samples"][:2]
    monkeypatch.setattr(generate_text, "draw", draw)
    assert generate(tiny, path, "--num_samples", "3", "--batch_size", "2") == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length", "12"], "--length: 12 is no multiple of --block_size 5; .* 10 and 15"),
        (["--T", "0"], "--T: '0': allowed are integers from 1"),
        (["--top_p", "1.5"], r"--top_p: '1.5': allowed are numbers in \(0, 1\]"),
        (["--top_p", "0"], "--top_p: '0': allowed"),
        (["--one_hot_value", "inf"], "--one_hot_value: 'inf': allowed are positive"),
        (["--num_samples", "many"], "--num_samples: 'many': allowed are integers"),
        (["--seed", "-1"], "--seed: '-1': allowed are integers from 0"),
        (["--device", "tpu"], "--device: tpu: allowed here are auto, cpu"),
        (["--precision", "int8"], "--precision: .*int8.*float32"),
    ],
)
def test_bad_arguments(tmp_path, capsys, flags, message):
    """Refused with argument, value and what is allowed, before anything is loaded."""
    output = ["--output", str(tmp_path / "samples.json")]
    with pytest.raises(SystemExit) as error:
        generate_text.main(["--model", "./nowhere", *output, *TINY_FLAGS, *flags])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_bad_output_files(tiny, tmp_path, capsys):
    """A file that holds something else is not overwritten; one that cannot be is named."""
    path = tmp_path / "samples.json"
    generate(tiny, path, "--num_samples", "1")
    flags = ["--model", str(tiny), *TINY_FLAGS, "--output"]
    for text, message in ((path.read_text(), "--top_p 0.95"), ("[]", "no file of samples")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            generate_text.main([*flags, str(path), "--top_p", "0.5"])
        assert message in capsys.readouterr().err and path.read_text() == text
    assert generate_text.main([*flags, str(path / "below" / "a file")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_blocks_beyond_the_positions(tiny, tmp_path, capsys):
    """Two blocks must fit into RoBERTa's context."""
    flags = ["--length", "64", "--block_size", "32", "--output", str(tmp_path / "samples.json")]
    assert generate_text.main(["--model", str(tiny), *TINY_FLAGS, *flags]) == 1
    assert "--block_size 32" in (error := capsys.readouterr().err) and "1 to 31" in error


def test_bad_reports(tiny, scorer, tmp_path, capsys):
    """What cannot be scored is named; nothing is written."""
    path = tmp_path / "samples.json"
    cases = [(None, "there is no such file"), ("{}", "no file of generate_text.py")]
    cases += [('{"settings": {"length": 5}, "samples": []}', "holds no samples yet")]
    for text, message in cases:
        if text is not None:
            path.write_text(text)
        assert report_genppl.main([str(path), "--scorer", str(scorer)]) == 1
        assert message in capsys.readouterr().err
    sample = {"index": 0, "text": "a text", "nfe": 4}
    path.write_text(json.dumps({"settings": {"length": 5}, "samples": [sample]}))
    assert report_genppl.main([str(path), "--scorer", str(tmp_path)]) == 1
    assert f"--scorer {tmp_path}: cannot score samples" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["samples.json"]


def test_texts_without_a_scored_token(scorer, tmp_path):
    """An empty text has no perplexity; it stays out of the means, and JSON stays JSON."""
    path = tmp_path / "samples.json"
    samples = [{"index": i, "text": text, "nfe": 4} for i, text in enumerate(("", "a text"))]
    path.write_text(json.dumps({"settings": {"length": 5}, "samples": samples}))
    assert report_genppl.main([str(path), "--scorer", str(scorer), "--device", "cpu"]) == 0
    text = path.with_suffix(".genppl.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (report["num_samples"], report["num_scored"]) == (2, 1)
    assert report["samples"][0]["gen_ppl"] is None and report["gen_ppl_standard_error"] is None


# --- the batch script ----------------------------------------------------------------------


def run_batch(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run the batch script with a stub in place of Python, which prints its arguments."""
    stub = tmp_path / "bin" / "python-stub"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/usr/bin/env bash\necho "$@"\n')
    stub.chmod(0o755)
    environment = {
        "PATH": f"{stub.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHON": str(stub)
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(BATCH_SCRIPT), *arguments],
        env=environment | variables, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_batch_runs_every_setting_here(tmp_path):
    """Without Slurm: samples and scores of each length, number of steps and seed."""
    if shutil.which("sbatch"):
        pytest.skip("this machine has a Slurm")
    (tmp_path / "my-model").mkdir()
    result = run_batch(tmp_path, "--batch_size", "5", SEEDS="3 4", MODEL="my-model")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    runs, reports = lines[::2], lines[1::2]
    assert len(runs) == len(reports) == 2 * 2 * 2
    settings = set()
    for run, report in zip(runs, reports, strict=True):
        assert run[:2] == ["-u", "ssd-lm/generate_text.py"]
        args = generate_text.parse_arguments(run[2:])
        settings.add((args.length, args.T, args.seed, args.output))
        assert (args.model, args.batch_size) == (str(tmp_path / "my-model"), 5)
        report_args = report_genppl.parse_arguments(report[2:])
        assert [str(path) for path in report_args.samples] == [args.output]
        assert report_args.scorer == "gpt2-large"
    assert len({output for *_, output in settings}) == 8
    expected = {(n, t, s) for n in (1025, 2050) for t in (1000, 25) for s in (3, 4)}
    assert {setting[:3] for setting in settings} == expected


def test_batch_submits_itself(tmp_path):
    """With Slurm: one job per setting, each of which the script accepts."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text('#!/usr/bin/env bash\necho "$@"\n')
    sbatch.chmod(0o755)
    result = run_batch(tmp_path, SEEDS="1", LENGTHS="1025")
    assert result.returncode == 0, result.stderr
    jobs = [line.split() for line in result.stdout.splitlines()]
    assert [job[1:] for job in jobs] == [
        ["job", "1025", "1000", "1"], ["job", "1025", "25", "1"]
    ]  # fmt: skip
    assert {Path(job[0]) for job in jobs} == {BATCH_SCRIPT}


def test_batch_usage(tmp_path):
    """Missing and unknown arguments end with the usage."""
    for arguments in (["job", "1025"], ["1025", "1000"]):
        result = run_batch(tmp_path, *arguments)
        assert result.returncode == 1 and "usage:" in result.stderr


def test_shellcheck():
    """shellcheck finds nothing, where it is installed; the script may be run by its name."""
    assert os.access(BATCH_SCRIPT, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    result = subprocess.run(
        ["shellcheck", "-x", BATCH_SCRIPT], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
