"""`python -m scripts.compare_samples`: texts of any kind, its numbers, and what it does without."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.generative_perplexity import GenerativePerplexity
from evaluation.sample_log import SampleRecord, append_samples
from scripts import compare_samples
from scripts.compare_samples import main
from tests.docs.pages import page
from tests.helpers.byte_scorer import save_byte_scorer
from tests.helpers.small_run import sentences, write_text

NO_NETWORK = ["--scorer", "null", "--featurizer", "null", "--tokenizer", "bytes"]
TOKEN_ROWS = {
    "token_entropy", "unigram_entropy", "distinct_1", "distinct_2", "distinct_3", "distinct_4",
    "repeated_4", "texts", "tokens", "length",
}  # fmt: skip


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> str:
    return save_byte_scorer(tmp_path_factory.mktemp("scorer"), context=64)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """text.txt, a sentence per line; samples in `same`, and ones that shout them in `log`."""
    monkeypatch.chdir(tmp_path)
    texts = [line.strip() for line in sentences()]
    (tmp_path / "text.txt").write_text("\n".join(texts) + "\n")
    write_samples("log", [text.upper().replace(".", "!") for text in texts[:60]])
    write_samples("same", texts[60:])
    return tmp_path


def write_samples(logdir: str, texts: list[str]) -> None:
    append_samples(
        logdir, [SampleRecord(samples=t, gen_nfes=1, gen_lengths=len(t), seed=1) for t in texts]
    )


def compare(*arguments: str, status: int = 0) -> dict:
    """Runs the command; what it wrote as JSON."""
    assert main([*arguments, "--json", "results.json"]) == status
    return json.loads(Path("results.json").read_text())


def values(results: dict, side: str) -> dict[str, float]:
    return {key: row[side]["value"] for key, row in results["rows"].items() if row[side]}


def test_statistics_against_values_counted_by_hand(folder):
    """Bytes as tokens: "abab" and "cc" beside "abcd" and "efgh"."""
    write_samples("few", ["abab", "cc"])
    Path("few.txt").write_text("abcd\n\nefgh\n")
    found = compare("few", "few.txt", *NO_NETWORK, "--document", "line")
    assert values(found, "samples") == pytest.approx({
        "token_entropy": math.log(2) / 2,
        "unigram_entropy": math.log(3),  # each of a, b and c twice
        "distinct_1": 3 / 6,
        "distinct_2": 3 / 4,  # ab ba ab, cc
        "distinct_3": 1.0,
        "distinct_4": 1.0,
        "repeated_4": 0.0,
        "texts": 2,
        "tokens": 6,
        "length": 3.0,
    })  # fmt: skip
    assert values(found, "reference")["unigram_entropy"] == pytest.approx(math.log(8))
    entropy = found["rows"]["token_entropy"]
    assert entropy["samples"]["std_error"] == pytest.approx(math.log(2) / 2)
    assert entropy["reference"]["std_error"] == 0
    assert found["tokenizer"] == "bytes" and "special tokens were taken out" in found["notes"][1]


def test_text_of_the_same_kind_is_nearer(folder, scorer, capsys):
    """Every row has both sides; MAUVE is low for texts of another kind, and has an interval."""
    pytest.importorskip("mauve", reason="needs mauve-text, see requirements-eval.txt")
    networks = ["--scorer", scorer, "--featurizer", scorer, "--document", "line"]
    results = {name: compare(name, "text.txt", *networks) for name in ("log", "same")}
    printed = capsys.readouterr()
    for name, found in results.items():
        assert set(found["rows"]) == TOKEN_ROWS | {"mauve", "gen_ppl"}
        assert (found["featurizer"], found["scorer"]) == (scorer, scorer)
        assert found["rows"]["mauve"]["name"] == f"MAUVE ({scorer}, 5 seeds of k-means)"
        score = found["rows"]["mauve"]["samples"]
        assert 0 < score["min"] <= score["value"] <= score["max"] <= 1
        assert found["rows"]["gen_ppl"]["samples"]["std_error"] > 0
        assert f"{name} beside text.txt" in printed.out
        assert any("fewer than 1,000 texts" in note for note in found["notes"])
    mauve = {name: found["rows"]["mauve"] for name, found in results.items()}
    assert mauve["log"]["samples"]["max"] < 0.7 < mauve["same"]["samples"]["min"]
    # 144 sentences are twice 60 and not twice 84
    assert mauve["log"]["reference"]["value"] > 0.5 and mauve["same"]["reference"] is None
    assert any("itself needs 168 texts" in note for note in results["same"]["notes"])
    for line in ("Featurising samples: ", "Scoring reference: ", "Tokenizing SAMPLES: "):
        assert line in printed.err  # a log's progress


def test_perplexity_is_that_of_sample_eval(folder, scorer):
    """The mean over texts of e to the mean nll, of the same texts."""
    found = compare(
        "log/samples.csv", "text.txt", "--document", "line", "--scorer", scorer,
        "--featurizer", "null", "--length", "30", "--batch-size", "7",
    )  # fmt: skip
    texts = [record.samples[:30] for record in compare_samples.read_samples("log/samples.csv")]
    model = GenerativePerplexity.load(scorer, device="cpu")
    expected = [score.gen_ppl for score in model.score(texts, max_length=99, batch_size=1)]
    row = found["rows"]["gen_ppl"]["samples"]
    error = np.std(expected, ddof=1) / len(expected) ** 0.5
    assert row == pytest.approx({"value": np.mean(expected), "std_error": error}, rel=1e-5)
    assert found["rows"]["length"]["reference"]["value"] == 30


def test_the_golden_scorer(folder, shared):
    """tiny-gpt2 works here, offline and on the CPU, and gives the original's perplexities."""
    pytest.importorskip("mauve", reason="needs mauve-text, see requirements-eval.txt")
    model = folder / "tiny-gpt2"
    model.mkdir()
    for source in ("data/tokenizers/gpt2", "golden/tiny-gpt2"):  # either has a config.json
        for file in (shared / source).iterdir():
            (model / file.name).write_bytes(file.read_bytes())
    golden = json.loads((shared / "golden/gen_ppl.json").read_text())[:3]
    write_samples("golden", [entry["text"] for entry in golden])
    networks = ["--scorer", str(model), "--featurizer", str(model)]
    lengths = ["--tokenizer", str(model), "--document", "line"]
    found = compare("golden", "golden", *networks, *lengths, status=1)  # too few texts for MAUVE
    assert found["rows"]["gen_ppl"]["samples"]["value"] == pytest.approx(
        sum(entry["gen_ppl"] for entry in golden) / 3, rel=1e-4
    )
    found = compare("log", "text.txt", *networks, *lengths, "--num-texts", "20")
    assert found["tokenizer"] == str(model) and found["rows"]["mauve"]["samples"]["value"] > 0


def test_files_of_every_kind_as_reference(folder):
    """Text, JSON lines with `text`, samples as CSV and JSON lines: the same numbers."""
    write_samples("given", [line.strip() for line in sentences()])
    jsonl = "".join(json.dumps({"text": line.strip()}) + "\n" for line in sentences())
    Path("text.jsonl").write_text(jsonl)
    kinds = ["text.txt", "text.jsonl", "given", "given/samples.csv", "given/samples.jsonl"]
    found = [
        values(compare("log", kind, *NO_NETWORK, "--document", "line"), "reference")
        for kind in kinds
    ]
    assert all(each == found[0] for each in found)
    both = compare("log", "text.txt", "text.jsonl", *NO_NETWORK, "--document", "line")
    assert "288 of the reference" in both["notes"][0]


def test_rows_of_a_data_set_as_reference(folder):
    """Decoded as samples are, specials and all; their tokenizer counts."""
    write_text(folder)
    write_samples("rows", ["[BOS]" + "ab " * 10 + "[EOS]"] * 3)
    overrides = [
        "data=local", "data.train_path=train.txt", "data.valid_path=valid.txt",
        "data.cache_dir=cache", "data.tokenizer_name_or_path=bytes", "data.document=line",
        "model.length=32",
    ]  # fmt: skip
    networks = ["--scorer", "null", "--featurizer", "null"]
    found = compare("rows", *overrides, *networks)
    assert found["notes"][1] == "special tokens stay in the texts"
    assert found["length"] == 32 and found["reference"] == overrides
    assert values(found, "samples")["length"] == values(found, "reference")["length"] == 32
    plain = compare("rows", "valid.txt", "--document", "line", *NO_NETWORK)
    assert values(plain, "samples")["length"] == 30  # without BOS and EOS


@pytest.mark.parametrize("lacks", ["network", "package", "memory", "scorer"])
def test_what_cannot_be_computed_hides_nothing_else(folder, scorer, monkeypatch, capsys, lacks):
    """Row and JSON say so, one line says why, and so does the exit status."""
    arguments = {"--scorer": scorer, "--featurizer": scorer}
    cause, key = f"{folder}/none", "mauve"
    if lacks == "network":
        pytest.importorskip("mauve", reason="needs mauve-text, see requirements-eval.txt")
        arguments["--featurizer"] = f"{folder}/none"
    elif lacks == "memory":
        pytest.importorskip("mauve", reason="needs mauve-text, see requirements-eval.txt")
        cause = "CUDA out of memory"

        def features(*_):
            raise torch.OutOfMemoryError(cause)

        monkeypatch.setattr(compare_samples.Featurizer, "features", features)
    elif lacks == "package":
        monkeypatch.setitem(sys.modules, "mauve", None)
        cause = "pip install -r requirements-eval.txt"
    else:
        arguments |= {"--scorer": f"{folder}/none", "--featurizer": "null", "--tokenizer": "bytes"}
        key = "gen_ppl"
    flat = [part for pair in arguments.items() for part in pair]
    found = compare("log", "text.txt", "--document", "line", *flat, status=1)
    row = found["rows"][key]
    assert row["samples"] is None and row["reference"] is None and cause in row["cause"]
    assert set(values(found, "samples")) >= TOKEN_ROWS
    assert ("gen_ppl" in values(found, "samples")) == (key == "mauve")
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert cause in line and "Traceback" not in printed.err
    assert "not computed" in printed.out


def test_the_page_names_every_row(folder):
    """docs/sampling.md says what each row is."""
    (rows,) = [
        [cells["row"] for cells in table.rows]
        for table in page("docs/sampling.md").tables
        if table.heading == ("row", "is")
    ]
    named = {name for row in rows for name in row.replace(" to distinct-4", "").split(", ")}
    named = named | {f"distinct-{n}" for n in range(2, 5)}
    found = compare("log", "text.txt", "--document", "line", *NO_NETWORK)["rows"]
    own = {row["name"].split(" of ")[0].split(" (")[0] for row in found.values()}
    assert named == own | {"MAUVE", "generative perplexity"}


def test_too_few_texts_for_mauve(folder, scorer):
    """The message says how many it needs."""
    pytest.importorskip("mauve", reason="needs mauve-text, see requirements-eval.txt")
    networks = ["--scorer", "null", "--featurizer", scorer, "--num-texts", "19"]
    found = compare("log", "text.txt", "--document", "line", *networks, status=1)
    assert "at least 20 texts on each side" in found["rows"]["mauve"]["cause"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["none", "text.txt"], "SAMPLES='none' does not exist"),
        (["log", "none.txt"], "REFERENCE='none.txt' does not exist"),
        (["log", "text.txt", "--scorer", "./none"], "--tokenizer=null leaves nothing to count"),
        (["log", "text.txt", "--tokenizer", "./none"], "--tokenizer=./none leaves nothing"),
        (["log", "data=local", "data.tokenizer_name_or_path=./none", "data.valid_path=text.txt"],
         "data.tokenizer_name_or_path='./none' could not be loaded"),
        (["log", "data=unheard-of"], "unheard-of"),
        (["log", "text.txt", "--tokenizer", "bytes", "--length", "9999"],
         "SAMPLES: none of its 60 texts has --length=9999 tokens"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_line(folder, capsys, arguments, cause):
    """No tokenizer, no text, no file: what is missing and what is allowed."""
    networks = [] if "--scorer" in arguments else ["--scorer", "null"]
    assert main([*arguments, *networks, "--featurizer", "null"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert cause in lines[-1] and lines[-1].startswith("error: ")


def test_numbers_of_the_command_line(folder, capsys):
    with pytest.raises(SystemExit):
        main(["log", "text.txt", "--length", "0"])
    assert "'0' is no whole number from 1 on" in capsys.readouterr().err
