"""The data sets: where they are looked for, which part is read, and what failure says."""

import dataclasses
import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import yaml
from omegaconf import DictConfig

from configuration.data_request import data_request
from corpora.registry import DATASETS
from corpora.tokenization import load_tokenizer
from dataloader import get_dataloaders, get_tokenizer

BYTES = "data.tokenizer_name_or_path=bytes"

# data file -> the arguments of `load_dataset` for validation, and the text column
ON_THE_HUB = {
    "ag_news": ("fancyzhx/ag_news", None, None, "test", "text"),
    "lambada": ("EleutherAI/lambada_openai", "default", None, "test", "text"),
    "lm1b-wrap": ("FrankCCCCC/lm1b", None, None, "test", "text"),
    "openwebtext": ("Salesforce/wikitext", "wikitext-103-raw-v1", None, "validation", "text"),
    "openwebtext-split": ("Skylion007/openwebtext", None, None, "train[-100000:]", "text"),
    "ptb": (
        "ptb-text-only/ptb_text_only",
        None,
        "refs/convert/parquet",
        "validation",
        "sentence",
    ),
    "scientific_papers_arxiv": (
        "armanc/scientific_papers",
        None,
        "refs/convert/parquet",
        "validation",
        "article",
    ),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", None, "validation", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "validation", "text"),
}


def valid_text(config: DictConfig) -> str:
    """The validation rows as one text (bytes tokenizer, no special tokens)."""
    tokenizer = get_tokenizer(data_request(config))
    _, loader = get_dataloaders(data_request(config), tokenizer, skip_train=True)
    return "".join(tokenizer.decode(row) for batch in loader for row in batch["input_ids"])


def test_every_data_file_names_known_sets(project: Path):
    files = [path for path in (project / "configs/data").glob("*.yaml") if path.stem != "_base"]
    named = [yaml.safe_load(path.read_text()) for path in files]
    assert {data["train"] for data in named} | {data["valid"] for data in named} == set(DATASETS)


@pytest.mark.parametrize("data", ON_THE_HUB)
def test_hub_location(data_config: Callable[..., DictConfig], monkeypatch, data: str):
    """Parquet repositories and Parquet exports: nothing here runs a loading script. Columns
    besides the text are dropped; the original crashed on them."""
    repo, subset, revision, split, column = ON_THE_HUB[data]
    asked = {}

    def load_dataset(path: str, name: str | None, **options):
        asked.update(options, path=path, name=name)
        return datasets.Dataset.from_dict({"label": [0] * 40, column: ["some words"] * 40})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = data_config(f"data={data}", BYTES)
    assert "some words" in valid_text(config)
    assert (asked["path"], asked["name"], asked["revision"]) == (repo, subset, revision)
    assert asked["split"] == split and "trust_remote_code" not in asked


def test_revision_is_passed_on(data_config: Callable[..., DictConfig], monkeypatch):
    asked = {}

    def load_dataset(*args, **options):
        asked.update(options)
        return datasets.Dataset.from_dict({"text": ["some words"] * 40})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    valid_text(data_config("data=ag_news", "data.revision=abc123", BYTES))
    assert asked["revision"] == "abc123"


@pytest.mark.parametrize(
    ("data", "split", "is_streamed"),
    [("openwebtext-streaming", "train", True), ("openwebtext-split", "train[:-100000]", False)],
)
def test_streaming_from_the_hub(
    data_config: Callable[..., DictConfig], monkeypatch, data: str, split: str, is_streamed: bool
):
    """A slice cannot be streamed, so that set is downloaded and tokenized while training."""
    asked = {}

    def load_dataset(*args, **options):
        asked.update(options)
        rows = datasets.Dataset.from_dict({"text": ["some words"] * 40, "label": [0] * 40})
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = data_config(f"data={data}", "data.streaming=true", BYTES)
    tokenizer = get_tokenizer(data_request(config))
    train, _ = get_dataloaders(data_request(config), tokenizer, skip_valid=True)
    assert "ord" in tokenizer.decode(next(iter(train))["input_ids"][0])
    assert (asked["split"], asked["streaming"]) == (split, is_streamed)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_null_in_a_stream(data_config: Callable[..., DictConfig], monkeypatch, num_workers: int):
    rows = datasets.Dataset.from_dict({"text": ["some words", None]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    config = data_config(
        "data=openwebtext-streaming", BYTES, f"loader.num_workers={num_workers}"
    )
    request = data_request(config)
    train, _ = get_dataloaders(request, get_tokenizer(request), skip_valid=True)
    with pytest.raises(ValueError, match="'text' of a document .* must hold text, not None"):
        next(iter(train))


def test_flags_are_keys_of_one_data_file_only(project: Path):
    """`+data.insert_valid_eos=False` must not collide with a key that is there already."""
    for path in (project / "configs/data").glob("*.yaml"):
        flags = [key for key in yaml.safe_load(path.read_text()) if key.startswith("insert_")]
        assert len(flags) == (4 if path.stem == "openwebtext-split" else 0), path


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("wikitext2", "Parquet files of its validation split of the subset wikitext-2-raw-v1"),
        ("ptb", r"penn_treebank/\*validation/\*.parquet from https://huggingface.co/datasets/ptb"),
        ("openwebtext-split", "https://huggingface.co/datasets/Skylion007/openwebtext/tree/main"),
    ],
)
def test_no_network_names_the_file_and_the_way_out(
    data_config: Callable[..., DictConfig], tmp_path: Path, monkeypatch, data: str, place: str
):
    def refuse(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    config = data_config(f"data={data}", BYTES)
    with pytest.raises(FileNotFoundError, match=f"{place}.*local copy in data.path"):
        valid_text(config)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(path.suffix == ".lock" for path in left)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:40] + bytes(8) + content[48:],
        lambda content: content[:10] + content[12:],
        lambda content: content.replace(b"PK\x01\x02", b"PK\x01\x03"),
    ],
)
def test_text8_in_a_damaged_archive(spoil, data_config, tmp_path):
    """Each was a traceback, of zipfile or zlib."""
    path = tmp_path / "text8.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", "the quick brown fox " * 500)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="text8.zip is no readable zip archive"):
        valid_text(data_config("data=text8", f"data.path={path}"))


def test_text8_without_network(data_config: Callable[..., DictConfig], monkeypatch):
    closed_port = dataclasses.replace(DATASETS["text8"], url="http://127.0.0.1:1/text8.zip")
    monkeypatch.setitem(DATASETS, "text8", closed_port)
    with pytest.raises(FileNotFoundError, match="127.0.0.1:1/text8.zip.*local copy.*data.path"):
        valid_text(data_config("data=text8"))


@pytest.mark.parametrize("is_zipped", [False, True])
def test_text8_is_cut_90_5_5(
    shared: Path, data_config: Callable[..., DictConfig], tmp_path: Path, is_zipped: bool
):
    """Rows are exactly N characters of the running text: no EOS and no BOS in between."""
    path = shared / "data/text8/text8.prefix742809"
    text = path.read_text()
    if is_zipped:
        path = tmp_path / "text8.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("text8", text)
    config = data_config("data=text8", f"data.path={path}", "model.length=64")
    tokenizer = load_tokenizer("text8")
    train, valid = get_dataloaders(data_request(config), tokenizer)
    length = len(text)
    assert len(train.dataset) == length * 18 // 20 // 64
    rows = [tokenizer.decode(row) for batch in valid for row in batch["input_ids"]]
    held_out = text[length * 19 // 20 :]
    assert "".join(rows) == held_out[: len(held_out) // 64 * 64]


def test_not_text8(data_config: Callable[..., DictConfig], tmp_path: Path):
    (tmp_path / "text8").write_text("no Capitals")
    with pytest.raises(ValueError, match="text8 is not text8: byte 4 is b'C'"):
        valid_text(data_config("data=text8", f"data.path={tmp_path}/text8"))


def test_last_hundred_thousand_documents_of_openwebtext_are_its_validation_set(
    data_config: Callable[..., DictConfig], tmp_path: Path
):
    records = [{"text": f"{i:06d}"} for i in range(100_050)]
    (tmp_path / "owt.jsonl").write_text("\n".join(map(json.dumps, records)))
    special = [f"data.insert_{r}_{w}=false" for r in ("train", "valid") for w in ("eos", "special")]
    config = data_config(
        "data=openwebtext-split",
        f"data.path={tmp_path}/owt.jsonl",
        "model.length=6",
        BYTES,
        *special,
    )
    tokenizer = get_tokenizer(data_request(config))
    train, valid = get_dataloaders(data_request(config), tokenizer)
    found = {tokenizer.decode(row["input_ids"]) for row in (train.dataset[i] for i in range(50))}
    assert len(train.dataset) == 50 and found == {f"{i:06d}" for i in range(50)}
    assert len(valid.dataset) == 100_000
    assert tokenizer.decode(valid.dataset[0]["input_ids"]) == "000050"


def test_openwebtext_copy_that_is_too_small(data_config: Callable[..., DictConfig], tmp_path: Path):
    (tmp_path / "owt.jsonl").write_text('{"text": "only one"}')
    config = data_config("data=openwebtext-split", f"data.path={tmp_path}/owt.jsonl", BYTES)
    with pytest.raises(ValueError, match="holds 1 documents, too few.*data.valid_path"):
        valid_text(config)


def test_paths_of_two_different_sets(data_config: Callable[..., DictConfig], tmp_path: Path):
    """data=openwebtext validates on WikiText-103: each role takes a path of its own."""
    (tmp_path / "owt.txt").write_text("the web " * 50)
    (tmp_path / "wiki").mkdir()
    for split in ("train", "valid"):
        (tmp_path / f"wiki/wiki.{split}.tokens").write_text(f" {split} @-@ text \n" * 50)
    config = data_config(
        "data=openwebtext",
        f"data.train_path={tmp_path}/owt.txt",
        f"data.valid_path={tmp_path}/wiki",
        BYTES,
    )
    tokenizer = get_tokenizer(data_request(config))
    train, valid = get_dataloaders(data_request(config), tokenizer)
    assert "web" in tokenizer.decode(next(iter(train))["input_ids"][0])
    assert tokenizer.decode(next(iter(valid))["input_ids"][0]).startswith("[BOS] valid-text\n")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=openwebtext", "data.path=x"], "data.path='x' does not say which set"),
        (["data=openwebtext", "data.revision=x"], "data.revision='x' does not say which set"),
        (["data=local"], "data.valid_path=null: data=local needs the path"),
        (["data.valid=wikitext-103"], "data.valid='wikitext-103' is unknown; allowed: ag_news"),
        (["data=local", "data.valid_path=x", "data.document=word"], "data.document='word'"),
        (["data=python_docs", "data.path=${cwd:}/README.md"], "comes with Python"),
        (["data=text8", "data.wrap=false"], "data.wrap=false.*running text"),
        (["model.length=2", "data=wikitext2"], "model.length=2 leaves no room"),
    ],
)
def test_bad_configuration(
    data_config: Callable[..., DictConfig], overrides: list[str], message: str
):
    with pytest.raises(ValueError, match=message):
        valid_text(data_config(BYTES, *overrides))


def test_one_file_for_both_roles_is_an_error(
    data_config: Callable[..., DictConfig], tmp_path: Path
):
    """It would train on the validation set without a word."""
    (tmp_path / "all.txt").write_text("some text\n" * 100)
    config = data_config("data=wikitext2", f"data.path={tmp_path}/all.txt", BYTES)
    with pytest.raises(ValueError, match="training and the validation set at once"):
        get_dataloaders(data_request(config), get_tokenizer(data_request(config)))
    assert "some text" in valid_text(config)  # evaluation alone may name one file


def test_saved_dataset_as_a_local_copy(data_config: Callable[..., DictConfig], tmp_path: Path):
    """Its .json files are no documents."""
    rows = datasets.Dataset.from_dict({"text": [" saved @-@ text \n"] * 40, "label": [0] * 40})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "saved")
    config = data_config("data=wikitext2", f"data.path={tmp_path}/saved", BYTES)
    text = valid_text(config)
    assert "saved-text" in text and "_fingerprint" not in text


def test_local_copies_of_every_text_set(
    shared: Path, data_config: Callable[..., DictConfig], gpt2, bert
):
    data = shared / "data"
    for group, path, tokenizer in [
        ("wikitext2", data / "wikitext-2", gpt2),
        ("lambada", data / "lambada", gpt2),
        ("lm1b-wrap", data / "lm1b", bert),
    ]:
        config = data_config(f"data={group}", f"data.path={path}", "model.length=128")
        _, loader = get_dataloaders(data_request(config), tokenizer, skip_train=True)
        for batch in itertools.islice(loader, 2):
            assert batch["input_ids"].shape == (2, 128)
