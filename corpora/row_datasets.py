"""Rows as torch data sets: prepared ones by index, or made from documents while training."""

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import datasets.distributed
import numpy as np
import torch

from corpora.lines import checked_text
from corpora.packing import DOCUMENTS_PER_BATCH, RowMaker
from corpora.row_cache import CachedRows
from utils import derive_seed

# The files of an epoch are shared out anew, so a share may be empty, but not again and again.
_EMPTY_EPOCHS = 8
# A set that lies in memory or on disk is streamed in this many pieces, to be shared out.
_NUM_SHARDS = 64


def share(
    documents: datasets.Dataset | datasets.IterableDataset, *, rank: int, world_size: int
) -> datasets.IterableDataset:
    """Returns one rank's share of a stream.

    Whole files where their number is a multiple of `world_size`; otherwise every rank reads all
    and keeps every `world_size`-th row.
    """
    if isinstance(documents, datasets.Dataset):
        documents = documents.to_iterable_dataset(num_shards=min(_NUM_SHARDS, len(documents)))
    return datasets.distributed.split_dataset_by_node(documents, rank=rank, world_size=world_size)


class PackedRows(torch.utils.data.Dataset):
    """Prepared rows as a map-style data set.

    Args:
        rows: (rows, N), or (rows, 2N) where a window is to be cut.
        crop_seed: cut a random window of half the row; None: give the whole row. The window
            depends on the seed and the index alone; beyond the last row the rows begin anew with
            other windows.
    """

    def __init__(self, rows: CachedRows, *, crop_seed: int | None = None):
        self._rows = rows
        self._crop_seed = crop_seed

    @property
    def sha256(self) -> str:
        """Hash of all token ids, as `CachedRows` has it."""
        return self._rows.sha256

    def __len__(self) -> int:
        return len(self._rows.ids)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = index % len(self)
        seed = None if self._crop_seed is None else (self._crop_seed, index)
        return _item(self._rows.ids[row], self._rows.lengths[row], seed)


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows made while training: tokenize, pack per 1,000 documents, shuffle block by block.

    Of each block of rows the order is random; while a block is given out the next one is read.
    The state that a checkpoint holds is where the block began and how many of its rows have been
    given out, so that a resumed stream reads that block again and goes on with the very next row.

    Args:
        documents: this rank's share. Workers share it out by file in turn.
        row_maker: makes the rows of a batch of documents.
        text_column: the documents' column.
        shuffle_buffer: rows of a block; 0 or 1 keeps the order, of the files too.
        seed: of the shuffling; the epoch is added to it.
        repeat: start the next epoch instead of ending, unless there are no rows.
        crop_seed: as for `PackedRows`; a stream of its own per rank.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        row_maker: RowMaker,
        *,
        text_column: str,
        shuffle_buffer: int,
        seed: int,
        repeat: bool,
        crop_seed: tuple[int, ...] | None = None,
    ):
        self._rows = documents.select_columns(text_column).map(
            _columns,
            fn_kwargs={"row_maker": row_maker, "text_column": text_column},
            batched=True,
            batch_size=DOCUMENTS_PER_BATCH,
            input_columns=[text_column],
            remove_columns=[text_column],
        )
        self._block_size = max(1, shuffle_buffer)
        self._seed = seed
        self._repeat = repeat
        self._crop_seed = crop_seed
        self._state: dict[str, Any] = {"epoch": 0, "block": 0, "given": 0, "start": None}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        worker_id = 0 if worker is None else worker.id
        num_empty = 0
        while num_empty < _EMPTY_EPOCHS:
            epoch = self._state["epoch"]
            for row in self._rest_of_epoch():
                seed = None
                if self._crop_seed is not None:
                    place = (epoch, self._state["block"], self._state["given"])
                    seed = (*self._crop_seed, worker_id, *place)
                yield _item(row["ids"], row["lengths"], seed)
            is_empty = self._state["block"] == self._state["given"] == 0
            self._state = {"epoch": epoch + 1, "block": 0, "given": 0, "start": None}
            if not self._repeat:
                return
            num_empty = num_empty + 1 if is_empty else 0

    def count(self, limit: int | None = None) -> int:
        """Returns the rows of this share, by making them, or `limit` where there are more."""
        return sum(1 for _ in itertools.islice(self._rows, limit))

    def _rest_of_epoch(self) -> Iterator[dict[str, Any]]:
        """The rows that follow the state, which moves along."""
        epoch, block, given, start = (self._state[k] for k in ("epoch", "block", "given", "start"))
        # The order of the files is drawn from this number, but for 0, which leaves it as it is.
        # `set_epoch` would write it to memory that all workers share, each in its own time.
        self._rows._epoch = derive_seed(self._seed, epoch) if self._block_size > 1 else epoch
        if start is not None:
            self._rows.load_state_dict(start)
        stream = iter(self._rows)
        current = list(itertools.islice(stream, self._block_size))
        while current:
            next_start = self._rows.state_dict()
            following = list(itertools.islice(stream, given))
            order = np.random.default_rng([self._seed, epoch, block]).permutation(len(current))
            for index in order[given:]:
                following += itertools.islice(stream, 1)
                given += 1
                self._state = {"epoch": epoch, "block": block, "given": given, "start": start}
                yield current[index]
            current, start, block, given = following, next_start, block + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state


def _item(
    ids: np.ndarray, length: int, crop_seed: tuple[int, ...] | None
) -> dict[str, torch.Tensor]:
    """Returns {input_ids (N,), attention_mask (N,)}, int64; with a seed, of a random half."""
    mask = np.arange(len(ids)) < length
    if crop_seed is not None:  # rows of a running text are full, so every window is
        half = len(ids) // 2
        start = np.random.default_rng(crop_seed).integers(len(ids) - half + 1)
        ids, mask = ids[start : start + half], mask[:half]
    return {
        "input_ids": torch.from_numpy(np.asarray(ids, dtype=np.int64)),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def _columns(texts: list[str], row_maker: RowMaker, text_column: str) -> dict[str, np.ndarray]:
    where = f"data.text_column={text_column!r} of a document that is streamed"
    rows = row_maker([checked_text(text, where) for text in texts])
    return {"ids": rows.ids, "lengths": rows.lengths}
