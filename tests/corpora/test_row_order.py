"""Which rows form which global batch: by seed and number alone."""

import itertools

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from configuration.data_request import data_request
from corpora.row_order import RowLoader, RowOrder, SnapshotLoader
from dataloader import get_dataloaders, get_tokenizer


def order(num_rows=50, *, batch_size, rank=0, world_size=1, global_batch_size=12, epoch=0):
    found = RowOrder(num_rows, batch_size=batch_size, global_batch_size=global_batch_size,
                     rank=rank, world_size=world_size, seed=3)  # fmt: skip
    found.set_epoch(epoch)
    return found


def global_batches(*, batch_size: int, world_size: int, **options) -> list[set[int]]:
    """The rows of each optimizer step, of all processes together."""
    shares = [
        list(order(batch_size=batch_size, rank=r, world_size=world_size, **options))
        for r in range(world_size)
    ]
    per_step = 12 // world_size
    return [
        set(itertools.chain(*(share[i : i + per_step] for share in shares)))
        for i in range(0, len(shares[0]), per_step)
    ]


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(12, 1), (6, 2), (3, 2), (1, 4), (4, 3), (2, 1)]
)
def test_global_batches_do_not_depend_on_processes_or_accumulation(batch_size, world_size):
    for epoch in (0, 1):
        found = global_batches(batch_size=batch_size, world_size=world_size, epoch=epoch)
        assert found == global_batches(batch_size=12, world_size=1, epoch=epoch)
        assert len(found) == 4 and all(len(batch) == 12 for batch in found), "2 of 50 are left out"
        assert len(set().union(*found)) == 48
        assert {row // 50 for row in set().union(*found)} == {epoch}
    assert len(order(batch_size=batch_size, world_size=world_size)) == 48 // world_size


def test_fewer_rows_than_a_global_batch():
    """Such an epoch is one smaller step, of as many rows as all processes can share."""
    assert len(list(order(11, batch_size=2, world_size=2))) == 4
    assert len(list(order(11, batch_size=5))) == 10


def test_epochs_differ_and_a_seed_repeats():
    first, second = (list(order(batch_size=12, epoch=epoch)) for epoch in (0, 1))
    assert first == list(order(batch_size=12)) and first != [row - 50 for row in second]


def test_setting_the_same_epoch_keeps_the_position():
    """Lightning names the epoch after the position has been restored."""
    found = order(batch_size=4)
    whole, found.first_row = list(found), 12
    found.set_epoch(0)
    assert list(found) == whole[12:]
    found.set_epoch(1)
    assert len(list(found)) == 48


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_then_two_then_one_process(local_config, num_workers):
    """A job that resumes on another number of GPUs repeats no row and loses none."""

    def loaders(world_size: int, batch_size: int, workers: int):
        config = local_config("loader.global_batch_size=8", f"loader.batch_size={batch_size}",
                              f"loader.num_workers={workers}")  # fmt: skip
        data = data_request(config)
        tokenizer = get_tokenizer(data)
        return [
            get_dataloaders(data, tokenizer, rank=r, world_size=world_size, skip_valid=True)[0]
            for r in range(world_size)
        ]

    def take(loaders_of_all, steps: int) -> tuple[list[set], dict]:
        """The rows of the next optimizer steps, and the position behind them."""
        iterators = [iter(loader) for loader in loaders_of_all]
        per_step = 8 // (len(iterators) * loaders_of_all[0].batch_size)
        found = []
        for _ in range(steps):
            batches = [next(it)["input_ids"] for it in iterators for _ in range(per_step)]
            found.append({tuple(row.tolist()) for batch in batches for row in batch})
        states = [loader.state_dict() for loader in loaders_of_all]
        assert all(state == states[0] for state in states), "one position for all"
        return found, states[0]

    expected, _ = take(loaders(1, 8, 0), 9)
    found, state = take(loaders(1, 4, num_workers), 3)
    for world_size, batch_size in ((2, 2), (1, 8)):
        resumed = loaders(world_size, batch_size, num_workers if world_size == 1 else 0)
        for loader in resumed:
            loader.load_state_dict(state)
        more, state = take(resumed, 3)
        found += more
    assert found == expected
    assert all(len(batch) == 8 for batch in found) and len(set().union(*found)) == 72


def test_position_before_batches_that_were_read_ahead(local_config):
    config = local_config("loader.global_batch_size=4", "loader.batch_size=4")
    data = data_request(config)
    train, _ = get_dataloaders(data, get_tokenizer(data), skip_valid=True)
    batches = iter(train)
    for _ in range(3):
        next(batches)
    assert train.state_dict() == {"epoch": 0, "first_row": 12}
    assert train.state_dict(unused=1) == {"epoch": 0, "first_row": 8}


class Squares(torch.utils.data.Dataset):
    """The squares below 10 ** 2."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return (index % 10) ** 2


@pytest.mark.parametrize("batches_before", [0, 2])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("kind", [RowLoader, SnapshotLoader])
def test_loading_processes_die(kind, epoch, batches_before, caplog):
    """In an epoch and between two: every row is given out once, in the same order."""
    order = RowOrder(10, batch_size=1, global_batch_size=1, rank=0, world_size=1, seed=1)
    sampler = order if kind is RowLoader else range(10)

    def loader(num_workers: int) -> StatefulDataLoader:
        return kind(Squares(), batch_size=1, sampler=sampler, num_workers=num_workers,
                    persistent_workers=num_workers > 0)  # fmt: skip

    expected = [int(row) for row in loader(0)]
    mortal = loader(2)
    for _ in range(epoch):
        assert [int(row) for row in mortal] == expected
    rows = iter(mortal)
    given = [int(next(rows)) for _ in range(batches_before)]
    if mortal._iterator is not None:
        for process in mortal._iterator._workers:
            process.kill()
            process.join()
    given += [int(row) for row in rows]
    assert given == expected
    assert ("starting others" in caplog.text) == (epoch + batches_before > 0)
    assert [int(row) for row in mortal] == expected
    mortal.shut_down()


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError])
def test_errors_of_rows_are_no_deaths(error):
    """They are raised at once, as without loading processes."""

    class Broken(Squares):
        def __getitem__(self, index: int) -> int:
            raise error("no such row")

    loader = SnapshotLoader(Broken(), batch_size=1, num_workers=1, persistent_workers=True)
    with pytest.raises(error, match="no such row"):
        next(iter(loader))
    loader.shut_down()
