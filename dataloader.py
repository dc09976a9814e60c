"""Documents -> tokens -> packed rows -> DataLoader.

Rows are prepared once and kept in a cache (`corpora.row_cache`), or made while training with
`data.streaming=true`. A batch is {input_ids (B, N) int64, attention_mask (B, N) int64}.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import rich.console
import rich.progress
import torch
from omegaconf import DictConfig
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from configuration.data_request import check_different_files, request_of
from corpora import row_cache, sources, tokenization
from corpora.packing import DOCUMENTS_PER_BATCH, RowMaker, Rows, map_in_order
from corpora.registry import DatasetSpec, get_spec
from corpora.row_datasets import PackedRows, StreamedRows, share
from corpora.row_order import RowLoader, RowOrder, SnapshotLoader, ignore_stop_signals
from corpora.sources import Request
from utils import absolute_path

logger = logging.getLogger(__name__)

# A BPE is trained on this much text at most: more changes its merges little and takes long.
_BPE_CHARACTERS = 100_000_000


def get_tokenizer(config: DictConfig) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of `data.tokenizer_name_or_path`.

    `bpe-<size>` is trained on the documents of `data.train` the first time and kept in the
    cache, so that an evaluation of the same data set gets the identical one.
    """
    name = config.data.tokenizer_name_or_path
    vocab_size = tokenization.bpe_size(name)
    if vocab_size is None:
        folder = absolute_path(name)
        return tokenization.load_tokenizer(folder if os.path.isdir(folder) else name)
    spec, request = request_of(config, "train")
    key = {
        "tokenizer": name,
        "characters": _BPE_CHARACTERS,
        "dataset": config.data.train,
        "documents": sources.describe(request),
    }
    cache_dir = os.path.join(absolute_path(config.data.cache_dir), "tokenizers")
    folder = row_cache.entry_path(cache_dir, f"{name}-{config.data.train}", key)
    if not folder.exists():
        with row_cache.locked(folder):
            if not folder.exists():  # nobody built it while this process waited
                tokenizer = tokenization.train_bpe(_texts(spec, request), vocab_size=vocab_size)
                with row_cache.new_directory(folder) as temporary:
                    tokenizer.save_pretrained(temporary)
                logger.info("Trained %s on %s: %s", name, config.data.train, folder)
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
    config: DictConfig,
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
        check_different_files(config)
    place = {"rank": rank, "world_size": world_size}
    train = None if skip_train else _train_loader(config, tokenizer, **place)
    valid = None if skip_valid else _valid_loader(config, tokenizer, **place)
    return train, valid


def _train_loader(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, *, rank: int, world_size: int
) -> StatefulDataLoader:
    """Returns the training loader; see `get_dataloaders`."""
    batch_size = config.loader.batch_size
    spec, request = request_of(config, "train")
    if config.data.streaming:
        documents = spec.load(request)
        rows = StreamedRows(
            share(documents, rank=rank, world_size=world_size),
            _row_maker(config, tokenizer, "train"),
            text_column=request.text_column,
            shuffle_buffer=config.data.shuffle_buffer,
            seed=config.seed,
            # Ranks whose shares differ in size would wait for each other at the end of an epoch.
            repeat=world_size > 1,
            crop_seed=(config.seed, rank) if spec.crops_train else None,
        )
        return _loader(SnapshotLoader, config, rows, batch_size, drop_last=True)
    crop_seed = config.seed if spec.crops_train else None
    rows = PackedRows(_rows(config, tokenizer, "train"), crop_seed=crop_seed)
    if len(rows) < batch_size * world_size:
        raise ValueError(_too_few(config, "train", len(rows), batch_size, world_size))
    order = RowOrder(
        len(rows),
        batch_size=batch_size,
        global_batch_size=config.loader.global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
    )
    return _loader(RowLoader, config, rows, batch_size, sampler=order, drop_last=True)


def _valid_loader(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, *, rank: int, world_size: int
) -> StatefulDataLoader:
    """Returns the validation loader; see `get_dataloaders`."""
    batch_size = config.loader.eval_batch_size
    rows = PackedRows(_rows(config, tokenizer, "valid"))
    if len(rows) < batch_size * world_size:
        raise ValueError(_too_few(config, "valid", len(rows), batch_size, world_size))
    share = range(rank, len(rows), world_size)
    return _loader(SnapshotLoader, config, rows, batch_size, sampler=share)


def _loader(
    kind: type[StatefulDataLoader],
    config: DictConfig,
    rows: torch.utils.data.Dataset,
    batch_size: int,
    **how: Any,
) -> StatefulDataLoader:
    num_workers = config.loader.num_workers
    return kind(
        rows,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=config.loader.pin_memory and torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
        **how,
    )


def _too_few(config: DictConfig, role: str, rows: int, batch_size: int, world_size: int) -> str:
    key = "loader.batch_size" if role == "train" else "loader.eval_batch_size"
    return (
        f"{key}={batch_size} needs at least {batch_size * world_size} rows on {world_size} "
        f"rank(s), but data.{role}={config.data[role]!r} has {rows} rows of model.length="
        f"{config.model.length}; allowed: {key} <= {rows // world_size}, a shorter model.length, "
        "or more text"
    )


def _rows(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, role: str
) -> row_cache.CachedRows:
    """Opens the packed rows of a role, and prepares them where the cache has none."""
    spec, request = request_of(config, role)
    row_maker = _row_maker(config, tokenizer, role)
    name = config.data[role]
    key = {
        "dataset": name,
        "documents": sources.describe(request),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "length": row_maker.length,
        "wrap": row_maker.wrap,
        "insert_eos": row_maker.insert_eos,
        "insert_special": row_maker.insert_special,
    }

    def build() -> Iterable[Rows]:
        documents = spec.load(request)
        batches = sources.in_batches(documents, request, DOCUMENTS_PER_BATCH)
        return rich.progress.track(
            map_in_order(row_maker, batches, num_proc=config.data.num_proc),
            description=f"Tokenizing {name} {request.split}",
            total=sources.num_batches(documents, DOCUMENTS_PER_BATCH),
            console=rich.console.Console(stderr=True),
        )

    cache_dir = os.path.join(absolute_path(config.data.cache_dir), "rows")
    return row_cache.get_or_build(cache_dir, f"{name} {request.split}", key, build)


def _row_maker(config: DictConfig, tokenizer: PreTrainedTokenizerBase, role: str) -> RowMaker:
    """Returns what makes the rows of a role, `train` or `valid`."""
    spec = get_spec(config.data[role], key=f"data.{role}")
    if not config.data.wrap and not spec.has_documents:
        raise ValueError(
            f"data.wrap=false pads each document to a row of its own, but data.{role}="
            f"{config.data[role]!r} is one running text; allowed: data.wrap=true"
        )
    insert_eos = _flag(config, f"insert_{role}_eos", default=spec.has_documents)
    insert_special = _flag(config, f"insert_{role}_special", default=spec.has_documents)
    if config.model.length < 3 and insert_special:
        raise ValueError(
            f"model.length={config.model.length} leaves no room between BOS and EOS; allowed: at "
            f"least 3, or +data.insert_{role}_special=false"
        )
    return RowMaker(
        tokenizer=tokenizer,
        length=config.model.length * (2 if role == "train" and spec.crops_train else 1),
        wrap=config.data.wrap,
        insert_eos=insert_eos,
        insert_special=insert_special,
        detokenize=spec.detokenize,
    )


def _flag(config: DictConfig, key: str, *, default: bool) -> bool:
    """Returns a key that openwebtext-split.yaml has, and others where the user adds it (`+`)."""
    # Neither `get` nor `in config.data`: OmegaConf raises and catches an exception in there, which
    # keeps the callers' frames, and so the loader, in a reference cycle; and a loader that is left
    # to the garbage collector waits 5 s for each worker.
    return config.data[key] if key in config.data.keys() else default
