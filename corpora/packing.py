"""Documents to rows of token ids: the arithmetic of packing, free of files and configuration."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from corpora.detokenizers import Detokenizer
from corpora.tokenization import encode, packing_ids

# Packing never crosses a batch of this many documents: what is left of a batch after its last
# whole row is dropped. Published numbers depend on it.
DOCUMENTS_PER_BATCH = 1_000
# Documents handed to the tokenizer at once, which bounds its working memory.
_DOCUMENTS_PER_CALL = 32
# Starting processes takes longer than tokenizing less text than this, some seconds.
_CHARACTERS_WORTH_A_POOL = 20_000_000
# The tokenizer's own threads keep so many CPUs busy, and processes would add nothing but their cost
# (`benchmarks/tokenize.py`).
_CPUS_OF_ONE_PROCESS = 2
# Text that has been handed to processes and is not yet rows; a larger batch is there alone.
_CHARACTERS_IN_FLIGHT = 400_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Turns a batch of documents into rows; picklable, so that processes can share the work.

    Attributes:
        tokenizer: has BOS, EOS and PAD.
        length: tokens per row, N.
        wrap: pack documents back to back; False: one document per row, padded or truncated.
        insert_eos: when packing, append EOS to each document.
        insert_special: wrap each row in BOS ... EOS.
        detokenize: applied to each document first.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    wrap: bool = True
    insert_eos: bool = True
    insert_special: bool = True
    detokenize: Detokenizer | None = None

    def __call__(self, texts: Sequence[str]) -> "Rows":
        """Makes the rows of one batch of documents."""
        if self.detokenize is not None:
            texts = [self.detokenize(text) for text in texts]
        documents: list[np.ndarray] = []  # a list takes nine times as much memory per id
        for start in range(0, len(texts), _DOCUMENTS_PER_CALL):
            encoded = encode(self.tokenizer, texts[start : start + _DOCUMENTS_PER_CALL])
            documents += [np.array(ids, dtype=np.int32) for ids in encoded]
        num_tokens = sum(map(len, documents))
        if self.wrap:
            bos, eos = packing_ids(self.tokenizer)
            ids = pack(
                documents,
                length=self.length,
                bos=bos,
                eos=eos,
                insert_eos=self.insert_eos,
                insert_special=self.insert_special,
            )
            lengths = np.full(len(ids), self.length, dtype=np.int32)
        else:
            ids, lengths = pad(
                documents,
                length=self.length,
                bos=self.tokenizer.bos_token_id,
                eos=self.tokenizer.eos_token_id,
                pad_id=self.tokenizer.pad_token_id,
                insert_special=self.insert_special,
            )
        return Rows(ids=ids, lengths=lengths, num_documents=len(documents), num_tokens=num_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows and what they were made from.

    Attributes:
        ids: token ids, (rows, N) int32.
        lengths: number of tokens before the padding, (rows,) int32.
        num_documents: documents that went in.
        num_tokens: their tokens, without special ones.
    """

    ids: np.ndarray
    lengths: np.ndarray
    num_documents: int
    num_tokens: int


def pack(
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    bos: int,
    eos: int,
    insert_eos: bool,
    insert_special: bool,
) -> np.ndarray:
    """Concatenates documents and cuts them into rows; the remainder is dropped.

    Args:
        documents: token ids per document.
        length: tokens per row, N.
        bos, eos: the special ids.
        insert_eos: append EOS to each document.
        insert_special: cut N - 2 tokens per row and wrap them in BOS ... EOS.

    Returns:
        (rows, N) int32.
    """
    end = np.array([eos] if insert_eos else [], dtype=np.int32)
    pieces = [end[:0]]  # no documents are no error
    for ids in documents:
        pieces += [np.asarray(ids, dtype=np.int32), end]
    stream = np.concatenate(pieces)
    width = length - 2 if insert_special else length
    rows = stream[: len(stream) // width * width].reshape(-1, width)
    if insert_special:
        rows = np.pad(rows, ((0, 0), (1, 1)))
        rows[:, 0], rows[:, -1] = bos, eos
    return rows


def pad(
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    bos: int,
    eos: int,
    pad_id: int,
    insert_special: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Gives each document a row of its own: BOS, as many tokens as fit, EOS, padding.

    Returns:
        ids (documents, N) int32 and lengths (documents,) int32.
    """
    rows = np.full((len(documents), length), pad_id, dtype=np.int32)
    lengths = np.empty(len(documents), dtype=np.int32)
    for row, ids in enumerate(documents):
        kept = [bos, *ids[: length - 2], eos] if insert_special else ids[:length]
        rows[row, : len(kept)] = kept
        lengths[row] = len(kept)
    return rows, lengths


def map_in_order(
    row_maker: RowMaker, batches: Iterable[Sequence[str]], *, num_proc: int
) -> Iterator[Rows]:
    """Yields the rows of each batch, in the order of the batches, whatever `num_proc` is.

    More processes than this one start where there are more CPUs than its threads keep busy, and
    once there is so much text that they are worth it. Only a few batches are in flight, so memory
    stays bounded however many documents there are.

    Raises:
        ChildProcessError: one of the processes died.
    """
    batches, num_characters = iter(batches), 0
    for batch in batches:
        yield row_maker(batch)
        num_characters += _num_characters(batch)
        if num_proc > _CPUS_OF_ONE_PROCESS and num_characters >= _CHARACTERS_WORTH_A_POOL:
            break
    else:
        return
    yield from _map_in_processes(row_maker, batches, num_proc=num_proc)


def _map_in_processes(
    row_maker: RowMaker, batches: Iterator[Sequence[str]], *, num_proc: int
) -> Iterator[Rows]:
    # spawn: forking a process that runs threads (tokenizers, CUDA) can hang
    context = multiprocessing.get_context("spawn")
    there, here = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(
        num_proc, mp_context=context, initializer=_start_worker, initargs=(row_maker, there)
    )
    in_flight: collections.deque[concurrent.futures.Future[Rows]] = collections.deque()
    sizes: collections.deque[int] = collections.deque()
    try:
        for batch in batches:
            size = _num_characters(batch)
            while in_flight and (
                len(in_flight) >= 2 * num_proc or sum(sizes) + size > _CHARACTERS_IN_FLIGHT
            ):
                sizes.popleft()
                yield in_flight.popleft().result()
            in_flight.append(pool.submit(_make_rows, batch))
            sizes.append(size)
        while in_flight:
            yield in_flight.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ChildProcessError(
            f"data.num_proc={num_proc}: one of the processes that tokenize was killed, mostly "
            "because memory ran out; allowed: fewer processes. What is finished is kept"
        ) from error
    finally:
        here.close()  # the processes end at once, whatever they are doing
        pool.shutdown(cancel_futures=True)


def _num_characters(texts: Sequence[str]) -> int:
    return sum(map(len, texts))


def _start_worker(row_maker: RowMaker, owner: multiprocessing.connection.Connection) -> None:
    """Keeps the row maker in a worker process, since sending it with each batch is slow.

    The process ends when its owner closes its end of the connection or is killed. Signals, which
    Slurm and Ctrl-C send to all processes, are for the owner.
    """
    global _worker_row_maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()
    _worker_row_maker = row_maker


def _end_with(owner: multiprocessing.connection.Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        owner.recv_bytes()
    os._exit(0)


def _make_rows(texts: Sequence[str]) -> Rows:
    return _worker_row_maker(texts)
