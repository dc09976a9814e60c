"""Documents to rows of token ids: the arithmetic of packing, free of files and configuration."""

import collections
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
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
# Starting processes takes longer than tokenizing fewer batches than this.
_BATCHES_WORTH_A_POOL = 32


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
        documents: list[list[int]] = []
        for start in range(0, len(texts), _DOCUMENTS_PER_CALL):
            documents += encode(self.tokenizer, texts[start : start + _DOCUMENTS_PER_CALL])
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
    end = (eos,) if insert_eos else ()
    stream = np.fromiter(
        itertools.chain.from_iterable(itertools.chain(ids, end) for ids in documents),
        dtype=np.int32,
    )
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

    With more than one process, only a few batches per process are in flight, so memory stays
    bounded however many documents there are.
    """
    batches = iter(batches)
    head = list(itertools.islice(batches, _BATCHES_WORTH_A_POOL))
    if num_proc <= 1 or len(head) < _BATCHES_WORTH_A_POOL:
        yield from map(row_maker, itertools.chain(head, batches))
        return
    # spawn: forking a process that runs threads (tokenizers, CUDA) can hang
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        num_proc, mp_context=context, initializer=_start_worker, initargs=(row_maker,)
    ) as pool:
        in_flight: collections.deque[concurrent.futures.Future[Rows]] = collections.deque()
        for batch in itertools.chain(head, batches):
            in_flight.append(pool.submit(_make_rows, batch))
            if len(in_flight) > 2 * num_proc:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()


def _start_worker(row_maker: RowMaker) -> None:
    """Keeps the row maker in a worker process, since sending it with each batch is slow."""
    global _worker_row_maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_row_maker = row_maker


def _make_rows(texts: Sequence[str]) -> Rows:
    return _worker_row_maker(texts)
