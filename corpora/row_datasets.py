"""Rows as torch data sets: prepared ones by index, or made from documents while training."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import datasets.distributed
import numpy as np
import torch

from corpora.packing import DOCUMENTS_PER_BATCH, RowMaker
from corpora.row_cache import CachedRows

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
        crop_seed: cut a random window of half the row; None: give the whole row.
    """

    def __init__(self, rows: CachedRows, *, crop_seed: Sequence[int] | None = None):
        self._rows = rows
        self._crop = None if crop_seed is None else RandomCrop(crop_seed)

    def __len__(self) -> int:
        return len(self._rows.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _item(self._rows.ids[index], self._rows.lengths[index], self._crop)


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows made while training: tokenize, pack per 1,000 documents, shuffle in a buffer.

    The state that a checkpoint holds is the position in the documents; the rows that were
    waiting in the shuffle buffer are not seen in that epoch any more.

    Args:
        documents: this rank's share. Workers share it out by file in turn.
        row_maker: makes the rows of a batch of documents.
        text_column: the documents' column.
        shuffle_buffer: rows held back to draw from; 0 or 1 keeps the order.
        seed: of the shuffling; the epoch is added to it.
        repeat: start the next epoch instead of ending.
        crop_seed: as for `PackedRows`.
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
        crop_seed: Sequence[int] | None = None,
    ):
        rows = documents.select_columns(text_column).map(
            _columns,
            fn_kwargs={"row_maker": row_maker},
            batched=True,
            batch_size=DOCUMENTS_PER_BATCH,
            input_columns=[text_column],
            remove_columns=[text_column],
        )
        if shuffle_buffer > 1:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self._rows = rows
        self._epoch = 0
        self._is_resumed = False
        self._repeat = repeat
        self._crop = None if crop_seed is None else RandomCrop(crop_seed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        is_first_worker = worker is None or worker.id == 0
        while True:
            self._rows.set_epoch(self._epoch)
            row = None
            for row in self._rows:
                yield _item(row["ids"], row["lengths"], self._crop)
            was_resumed, self._is_resumed = self._is_resumed, False
            self._epoch += 1
            if row is None and was_resumed:  # nothing was left of the epoch that was resumed
                continue
            if row is None and is_first_worker:  # the others may have no file of their own
                raise ValueError(
                    "data.streaming=true: the training documents do not fill one row of "
                    "model.length; allowed: more text, or a shorter model.length"
                )
            if row is None or not self._repeat:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._rows.load_state_dict(state["rows"])
        self._is_resumed = True


class RandomCrop:
    """Cuts random windows of half the length, with a random stream per rank and worker."""

    def __init__(self, seed: Sequence[int]):
        self._seed = seed
        self._random: np.random.Generator | None = None

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """ids (2N,) -> (N,)"""
        if self._random is None:  # made here: the worker that asks is not known any earlier
            worker = torch.utils.data.get_worker_info()
            worker_id = 0 if worker is None else worker.id
            self._random = np.random.default_rng([*self._seed, worker_id])
        length = len(ids) // 2
        start = self._random.integers(len(ids) - length + 1)
        return ids[start : start + length]


def _item(ids: np.ndarray, length: int, crop: RandomCrop | None) -> dict[str, torch.Tensor]:
    """Returns {input_ids (N,), attention_mask (N,)}, int64."""
    mask = np.arange(len(ids)) < length
    if crop is not None:  # rows of a running text are full, so every window is
        ids = crop(ids)
        mask = mask[: len(ids)]
    return {
        "input_ids": torch.from_numpy(np.asarray(ids, dtype=np.int64)),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def _columns(texts: list[str], row_maker: RowMaker) -> dict[str, np.ndarray]:
    rows = row_maker(texts)
    return {"ids": rows.ids, "lengths": rows.lengths}
