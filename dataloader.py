"""Documents -> tokens -> packed rows -> DataLoader.

Rows are prepared once and kept in a cache (`corpora.row_cache`), or made while training with
`data.streaming=true`. A batch is {input_ids (B, N) int64, attention_mask (B, N) int64}.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from configuration.data_request import DataRequest, Role
from corpora import row_cache, sources, tokenization
from corpora.packing import DOCUMENTS_PER_BATCH, RowMaker, Rows, map_in_order
from corpora.packing_progress import shown
from corpora.registry import DatasetSpec
from corpora.row_datasets import PackedRows, StreamedRows, share
from corpora.row_order import RowLoader, RowOrder, SnapshotLoader, ignore_stop_signals
from corpora.sources import Request

logger = logging.getLogger(__name__)

# A BPE is trained on this much text at most: more changes its merges little and takes long.
_BPE_CHARACTERS = 100_000_000


def get_tokenizer(data: DataRequest) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of `data.tokenizer_name_or_path`.

    `bpe-<size>` is trained on the documents of `data.train` the first time and kept in the
    cache, so that an evaluation of the same data set gets the identical one.
    """
    name = data.tokenizer_name_or_path
    vocab_size = tokenization.bpe_size(name)
    if vocab_size is None:
        return tokenization.load_tokenizer(name)
    spec, request = data.spec("train"), data.documents("train")
    key = {
        "tokenizer": name,
        "characters": _BPE_CHARACTERS,
        "dataset": data.train,
        "documents": sources.describe(request),
    }
    cache_dir = os.path.join(data.cache_dir, "tokenizers")
    folder = row_cache.entry_path(cache_dir, f"{name}-{data.train}", key)
    if not folder.exists():
        with row_cache.locked(folder):
            if not folder.exists():  # nobody built it while this process waited
                tokenizer = tokenization.train_bpe(_texts(spec, request), vocab_size=vocab_size)
                with row_cache.new_directory(folder) as temporary:
                    tokenizer.save_pretrained(temporary)
                logger.info("Trained %s on %s: %s", name, data.train, folder)
    return tokenization.load_tokenizer(str(folder))


def _texts(spec: DatasetSpec, request: Request) -> Iterator[str]:
    """Yields the documents that a BPE is trained on."""
    num_characters = 0
    for batch in sources.in_batches(spec.load(request), request, DOCUMENTS_PER_BATCH):
        for text in batch:
            if num_characters > _BPE_CHARACTERS:
                return
            num_characters += len(text)
            yield spec.detokenize(text) if spec.detokenize else text


def get_dataloaders(
    data: DataRequest,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int = 0,
    world_size: int = 1,
    skip_train: bool = False,
    skip_valid: bool = False,
) -> tuple[StatefulDataLoader | None, StatefulDataLoader | None]:
    """Returns the training and the validation loader of this rank.

    Batches are {input_ids (B, N) int64, attention_mask (B, N) int64}. Training rows are
    shuffled by `seed` and the epoch, and incomplete global batches are dropped, see `RowOrder`.
    Validation rows come in order, each on exactly one rank, the last batch as large as it turns
    out.

    Raises:
        ValueError, FileNotFoundError: the configuration or the data is unusable; the message
            names the key, its value and what is allowed.
        OSError: the cache cannot be written.
    """
    if not (skip_train or skip_valid):
        data.check_different_files()
    place = {"rank": rank, "world_size": world_size}
    train = None if skip_train else _train_loader(data, tokenizer, **place)
    valid = None if skip_valid else _valid_loader(data, tokenizer, **place)
    return train, valid


def _train_loader(
    data: DataRequest, tokenizer: PreTrainedTokenizerBase, *, rank: int, world_size: int
) -> StatefulDataLoader:
    """Returns the training loader; see `get_dataloaders`."""
    batch_size = data.batch_size
    if data.streaming:
        return _stream_loader(data, tokenizer, rank=rank, world_size=world_size)
    crop_seed = data.seed if data.spec("train").crops_train else None
    rows = PackedRows(_rows(data, tokenizer, "train"), crop_seed=crop_seed)
    if len(rows) < batch_size * world_size:
        raise ValueError(_too_few(data, "train", len(rows), world_size))
    order = RowOrder(
        len(rows),
        batch_size=batch_size,
        global_batch_size=data.global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=data.seed,
        repeats=data.repeats_epoch,
    )
    return _loader(RowLoader, data, rows, batch_size, sampler=order, drop_last=True)


def _stream_loader(
    data: DataRequest, tokenizer: PreTrainedTokenizerBase, *, rank: int, world_size: int
) -> StatefulDataLoader:
    """Returns the training loader of rows that are made while training."""
    spec, request, batch_size = data.spec("train"), data.documents("train"), data.batch_size
    row_maker, documents = _row_maker(data, tokenizer, "train"), spec.load(request)

    def rows_of(rank: int, world_size: int) -> StreamedRows:
        return StreamedRows(
            share(documents, rank=rank, world_size=world_size),
            row_maker,
            text_column=request.text_column,
            shuffle_buffer=data.shuffle_buffer,
            seed=data.seed,
            # Ranks whose shares differ in size would wait for each other at the end of an epoch.
            repeat=world_size > 1,
            crop_seed=(data.seed, rank) if spec.crops_train else None,
        )

    needed = batch_size * world_size
    if world_size > 1:  # it would repeat few rows for ever, and some ranks may have none
        found = rows_of(0, 1).count(needed)
        if found < needed:
            raise ValueError(_too_few(data, "train", found, world_size))
    rows = rows_of(rank, world_size)
    return _loader(
        SnapshotLoader,
        data,
        rows,
        batch_size,
        drop_last=True,
        too_few=lambda: _too_few_in_stream(data, rows.count(), world_size),
    )


def _valid_loader(
    data: DataRequest, tokenizer: PreTrainedTokenizerBase, *, rank: int, world_size: int
) -> StatefulDataLoader:
    """Returns the validation loader; see `get_dataloaders`."""
    batch_size = data.eval_batch_size
    rows = PackedRows(_rows(data, tokenizer, "valid"))
    if len(rows) < batch_size * world_size:
        raise ValueError(_too_few(data, "valid", len(rows), world_size))
    share = range(rank, len(rows), world_size)
    return _loader(SnapshotLoader, data, rows, batch_size, sampler=share)


def _loader(
    kind: type[StatefulDataLoader],
    data: DataRequest,
    rows: torch.utils.data.Dataset,
    batch_size: int,
    **how: Any,
) -> StatefulDataLoader:
    return kind(
        rows,
        batch_size=batch_size,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
        pin_memory=data.pin_memory and torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
        **how,
    )


def _too_few(data: DataRequest, role: Role, rows: int, world_size: int) -> str:
    key = "batch_size" if role == "train" else "eval_batch_size"
    batch_size = getattr(data, key)
    return (
        f"loader.{key}={batch_size} needs at least {batch_size * world_size} rows on {world_size} "
        f"rank(s), but data.{role}={data.name(role)!r} has {rows} rows of model.length="
        f"{data.length}; allowed: loader.{key} <= {rows // world_size}, a shorter model.length, "
        "or more text"
    )


def _too_few_in_stream(data: DataRequest, rows: int, world_size: int) -> str:
    """The same of a stream, of which each loading process fills batches of its own."""
    if data.num_workers <= 1 and world_size == 1:
        return _too_few(data, "train", rows, world_size)
    return (
        f"loader.batch_size={data.batch_size} needs at least {data.batch_size} rows in one of "
        f"loader.num_workers={data.num_workers} loading processes, but of data.train="
        f"{data.train!r} one of {world_size} rank(s) has {rows} rows of model.length={data.length} "
        "for all of them; allowed: a smaller loader.batch_size, loader.num_workers=0, a shorter "
        "model.length, or more text"
    )


def _rows(
    data: DataRequest, tokenizer: PreTrainedTokenizerBase, role: Role
) -> row_cache.CachedRows:
    """Opens the packed rows of a role, and prepares them where the cache has none."""
    spec, request, name = data.spec(role), data.documents(role), data.name(role)
    row_maker = _row_maker(data, tokenizer, role)
    key = {
        "dataset": name,
        "documents": sources.describe(request),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "vocab_size": tokenization.mask_index_and_vocab_size(tokenizer)[1],
        "length": row_maker.length,
        "wrap": row_maker.wrap,
        "insert_eos": row_maker.insert_eos,
        "insert_special": row_maker.insert_special,
    }

    def build(first: int) -> Iterator[Rows]:
        documents = spec.load(request)
        batches = sources.in_batches(documents, request, DOCUMENTS_PER_BATCH, first=first)
        return shown(
            map_in_order(row_maker, batches, num_proc=data.num_proc),
            name=f"{name} {request.split}",
            first=first,
            total=sources.num_batches(documents, DOCUMENTS_PER_BATCH),
        )

    cache_dir = os.path.join(data.cache_dir, "rows")
    return row_cache.get_or_build(cache_dir, f"{name} {request.split}", key, build)


def _row_maker(data: DataRequest, tokenizer: PreTrainedTokenizerBase, role: Role) -> RowMaker:
    """Returns what makes the rows of a role."""
    spec, insert_special = data.spec(role), data.insert_special(role)
    if not data.wrap and not spec.has_documents:
        raise ValueError(
            f"data.wrap=false pads each document to a row of its own, but data.{role}="
            f"{data.name(role)!r} is one running text; allowed: data.wrap=true"
        )
    if data.length < 3 and insert_special:
        raise ValueError(
            f"model.length={data.length} leaves no room between BOS and EOS; allowed: at least 3, "
            f"or +data.insert_{role}_special=false"
        )
    return RowMaker(
        tokenizer=tokenizer,
        length=data.length * (2 if role == "train" and spec.crops_train else 1),
        wrap=data.wrap,
        insert_eos=data.insert_eos(role),
        insert_special=insert_special,
        detokenize=spec.detokenize,
    )
