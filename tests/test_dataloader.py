"""Loaders: order, ranks, workers, resuming, padding, cropping and streaming."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from configuration.data_request import data_request
from dataloader import get_dataloaders, get_tokenizer

NO_SPECIALS = [
    f"+data.insert_{r}_{w}=false" for r in ("train", "valid") for w in ("eos", "special")
]


def loaders(config: DictConfig, **options):
    return get_dataloaders(data_request(config), get_tokenizer(data_request(config)), **options)


def rows(loader, batches: int | None = None) -> list[tuple[int, ...]]:
    """The rows of the first batches."""
    found = itertools.islice(loader, batches)
    return [tuple(row.tolist()) for batch in found for row in batch["input_ids"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches(local_config, num_workers: int):
    """num_workers=0 works; the original crashed on it."""
    train, valid = loaders(local_config(f"loader.num_workers={num_workers}"))
    for loader in (train, valid):
        batch = next(iter(loader))
        assert {name: (tuple(v.shape), v.dtype) for name, v in batch.items()} == {
            "input_ids": ((2, 16), torch.int64),
            "attention_mask": ((2, 16), torch.int64),
        }
        assert batch["attention_mask"].all()


def test_training_order_depends_on_seed_and_epoch(local_config):
    train, _ = loaders(local_config(), skip_valid=True)
    first = rows(train)
    train.sampler.set_epoch(1)
    second = rows(train)
    other_seed = rows(loaders(local_config("seed=7"), skip_valid=True)[0])
    again = rows(loaders(local_config(), skip_valid=True)[0])
    assert first == again
    assert first != second != other_seed != first
    assert sorted(first)[:3] == sorted(second)[:3]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_out_the_rows(local_config, world_size: int):
    """Validation sees every row once. A sampler that pads to equal shares counts some twice."""
    trains, valids = zip(
        *(loaders(local_config(), rank=r, world_size=world_size) for r in range(world_size)),
        strict=True,
    )
    expected = [tuple(row["input_ids"].tolist()) for row in valids[0].dataset]
    seen = [rows(valid) for valid in valids]
    assert seen == [expected[rank::world_size] for rank in range(world_size)]
    train_rows = [rows(train) for train in trains]
    assert len({len(share) for share in train_rows}) == 1
    num_rows = len(trains[0].dataset)
    assert len(train_rows[0]) == num_rows // world_size // 2 * 2
    assert len(set(itertools.chain(*train_rows))) == len(set(train_rows[0])) * world_size


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_resumes_where_it_stopped(local_config, num_workers: int):
    """The original started the data order again after every restart."""
    config = local_config(f"loader.num_workers={num_workers}")
    assert_resumes(config, after=5)


def assert_resumes(config: DictConfig, *, after: int) -> None:
    """What a training loader gives out after so many batches, a new one in its state does too."""
    train, _ = loaders(config, skip_valid=True)
    batches = iter(train)
    for _ in range(after):
        next(batches)
    state = train.state_dict()
    expected = [next(batches)["input_ids"].tolist() for _ in range(4)]
    resumed, _ = loaders(config, skip_valid=True)
    resumed.load_state_dict(state)
    found = [batch["input_ids"].tolist() for batch in itertools.islice(resumed, 4)]
    assert found == expected


def test_without_wrapping_each_document_is_padded(local_config, gpt2, tmp_path: Path):
    (tmp_path / "valid.txt").write_text("Hello there\nA " + "long " * 40 + "line\n")
    _, valid = get_dataloaders(data_request(local_config("data.wrap=false")), gpt2, skip_train=True)
    (batch,) = valid
    assert batch["input_ids"][0].tolist() == [50256, 15496, 612, 50256] + [50256] * 12
    assert batch["attention_mask"].sum(1).tolist() == [4, 16]
    assert batch["input_ids"][1, [0, -1]].tolist() == [50256, 50256]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loader.eval_batch_size=9999"], "loader.eval_batch_size=9999 needs at least 9999 rows"),
        (["loader.batch_size=9999"], "loader.batch_size=9999 needs at least 9999 rows"),
    ],
)
def test_fewer_rows_than_a_batch(local_config, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=f"{message}.*allowed"):
        loaders(local_config(*overrides))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_documents(local_config, tmp_path: Path, content: str):
    (tmp_path / "valid.txt").write_text(content)
    with pytest.raises(ValueError, match="data.valid_path=.*holds no document"):
        loaders(local_config(), skip_train=True)


def test_crop(data_config: Callable[..., DictConfig], tmp_path: Path):
    """text8-crop: a random window of a row twice as long, another one in each epoch."""
    text = "".join(chr(ord("a") + i % 26) for i in range(20_000))
    (tmp_path / "text8").write_text(text)
    config = data_config("data=text8-crop", f"data.path={tmp_path}/text8")
    tokenizer = get_tokenizer(data_request(config))
    train, valid = loaders(config)
    assert len(train.dataset) == 18_000 // 32
    epochs = [epoch * len(train.dataset) for epoch in range(20)]
    windows = [train.dataset[index]["input_ids"] for index in epochs]
    assert all(tokenizer.decode(window) in text[:32] for window in windows)
    assert len({tuple(window.tolist()) for window in windows}) > 5
    assert next(iter(train))["input_ids"].shape == (2, 16)
    assert next(iter(valid))["input_ids"].shape == (2, 16)


def stream_config(config: Callable[..., DictConfig], folder: Path, *overrides: str) -> DictConfig:
    """Four files of which no row is like any other."""
    (folder / "many").mkdir(exist_ok=True)
    for file in range(4):
        lines = (hashlib.sha256(f"{file} {i}".encode()).hexdigest() + "\n" for i in range(30))
        (folder / f"many/{file}.txt").write_text("".join(lines))
    return config("data.streaming=true", f"data.train_path={folder}/many", *overrides)


def test_stream_without_shuffling_has_the_prepared_rows(local_config, tmp_path: Path):
    """Streaming trains; the original's streaming loader crashed."""
    config = stream_config(local_config, tmp_path, "data.shuffle_buffer=0", "loader.batch_size=1")
    streamed, _ = loaders(config, skip_valid=True)
    config.data.streaming = False
    prepared, _ = loaders(config, skip_valid=True)
    assert rows(streamed) == [
        tuple(prepared.dataset[i]["input_ids"].tolist()) for i in range(len(prepared.dataset))
    ]


def test_stream_is_shuffled_anew_each_epoch(local_config, tmp_path: Path):
    train, _ = loaders(stream_config(local_config, tmp_path), skip_valid=True)
    first, second = rows(train), rows(train)
    assert first != second and len(set(first)) == len(first) > 500


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (2, 2), (3, 0)])
def test_stream_is_shared_out(local_config, tmp_path: Path, world_size: int, num_workers: int):
    """By file among ranks and workers; by row where the files do not divide (3 ranks)."""
    config = stream_config(local_config, tmp_path, f"loader.num_workers={num_workers}")
    shares = [
        rows(loaders(config, skip_valid=True, rank=r, world_size=world_size)[0], 80)
        for r in range(world_size)
    ]
    assert len(set(itertools.chain(*shares))) == world_size * 160


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_resumes_where_it_stopped(local_config, tmp_path: Path, num_workers: int):
    config = stream_config(
        local_config, tmp_path, "data.shuffle_buffer=0", f"loader.num_workers={num_workers}"
    )
    assert_resumes(config, after=50)


def test_stream_resumed_at_its_end_goes_on(local_config, tmp_path: Path):
    """With all documents in the shuffle buffer, nothing is left of the epoch to resume."""
    config = stream_config(local_config, tmp_path)
    train, _ = loaders(config, skip_valid=True)
    batches = iter(train)
    next(batches)
    resumed, _ = loaders(config, skip_valid=True)
    resumed.load_state_dict(train.state_dict())
    assert len(rows(resumed)) > 500


def small_stream(config: Callable[..., DictConfig], folder: Path, *lines: int) -> DictConfig:
    """Files of so many lines, each of which is a row of its own; a batch is four."""
    (folder / "small").mkdir()
    for file, num_lines in enumerate(lines):
        text = "".join(f"{file} {i}\n" for i in range(num_lines))
        (folder / f"small/{file}.txt").write_text(text)
    return config(
        "data.streaming=true",
        f"data.train_path={folder}/small",
        "data.wrap=false",
        "loader.batch_size=4",
    )


@pytest.mark.parametrize(
    ("lines", "num_workers", "message"),
    [
        ((3,), 0, "loader.batch_size=4 needs at least 4 rows on 1 rank.* has 3 rows"),
        ((1,), 0, "has 1 rows"),
        ((0,), 0, "has 0 rows"),
        ((0,), 2, "has 0 rows"),
        ((3,), 1, "has 3 rows"),
        # enough together, but each process drops its incomplete batch
        ((3, 3), 2, "at least 4 rows in one of loader.num_workers=2 .* has 6 rows"),
    ],
)
def test_stream_without_a_batch(local_config, tmp_path: Path, lines, num_workers: int, message):
    """There were epochs without a batch for ever, at full load and without a message."""
    config = small_stream(local_config, tmp_path, *lines)
    config.loader.num_workers = num_workers
    train, _ = loaders(config, skip_valid=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            next(iter(train))


@pytest.mark.parametrize("lines", [(7,), (3, 3), (0, 0)])
def test_stream_without_a_batch_for_each_rank(local_config, tmp_path: Path, lines):
    """A few rows filled batch after batch, or some ranks ended and the others waited."""
    config = small_stream(local_config, tmp_path, *lines)
    for rank in range(2):
        message = f"needs at least 8 rows on 2 rank.* has {sum(lines)} rows"
        with pytest.raises(ValueError, match=message):
            loaders(config, skip_valid=True, rank=rank, world_size=2)


@pytest.mark.parametrize("lines", [(9, 0), (0, 9), (9, 3), (3, 9), (9,)])
def test_stream_goes_on_while_one_process_has_batches(local_config, tmp_path: Path, lines):
    """The error came where the first loading process had no row."""
    config = small_stream(local_config, tmp_path, *lines)
    config.loader.num_workers = 2
    train, _ = loaders(config, skip_valid=True)
    for _ in range(2):
        found = rows(train)
        assert len(found) == len(set(found)) == 8


def test_a_share_that_is_empty_in_one_epoch_goes_on_with_the_next(local_config, tmp_path: Path):
    """Its rank ended there, and the others waited for it."""
    config = small_stream(local_config, tmp_path, 9, 0, 9, 0)
    for rank in range(2):
        train, _ = loaders(config, skip_valid=True, rank=rank, world_size=2)
        assert len(rows(train, 20)) == 80


def test_stream_too_short_for_a_row(local_config, tmp_path: Path):
    (tmp_path / "train.txt").write_text("tiny")
    train, _ = loaders(local_config("data.streaming=true"), skip_valid=True)
    with pytest.raises(ValueError, match="loader.batch_size=2 needs .* has 0 rows"):
        next(iter(train))
