"""Canvases from files: prompts to go on from, and texts with gaps to fill.

A prompt file is plain text with a prompt per line, or JSON Lines with the key `prompt`. A file of
gaps is JSON Lines with the key `text`; in it `[MASK]` stands for one token to fill, `[MASK:n]` for
n of them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corpora.lines import checked_text, compression_of, read_json_lines, read_lines
from utils import get_logger

logger = get_logger(__name__)

GAP = re.compile(r"\[MASK(?::(\d+))?\]")
# The beginning of a gap that is none: of no token, or of a number that is no number.
BROKEN_GAP = re.compile(r"\[MASK:(?!\d*[1-9]\d*\]).{0,20}")
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class CanvasRow:
    """One row to complete.

    Attributes:
        tokens: ids, `mask_index` where a token is to be written; BOS first.
        limit: where the row ends at the latest; further masks follow the tokens up to there.
        source: the text it came from.
    """

    tokens: list[int]
    limit: int
    source: str


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, read as `corpora.lines` does.

    Raises:
        ValueError: an empty file, or a broken line (named).
        FileNotFoundError: there is no such file.
    """
    is_json = path.lower().removesuffix(compression_of(path)).endswith((".jsonl", ".json"))
    return [text for _, text in _read(path, key="prompt", is_json=is_json)]


def read_gap_texts(path: str) -> list[str]:
    """The texts with gaps of a JSON Lines file; errors as in `read_prompts`."""
    texts = _read(path, key="text", is_json=True)
    for where, text in texts:
        if broken := BROKEN_GAP.search(text):
            raise ValueError(f"{where}: {broken[0]!r} is no gap; allowed in [MASK:n] is n from 1")
        if not GAP.search(text):
            raise ValueError(f"{where}: no gap in this text; write [MASK] or [MASK:n] in it")
    return [text for _, text in texts]


def _read(path: str, *, key: str, is_json: bool) -> list[tuple[str, str]]:
    """The texts of a file, each behind its place for messages."""
    try:
        texts = _json_texts(path, key=key) if is_json else _plain_texts(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such file of {key}s") from error
    if not texts:
        raise ValueError(f"{path}: the file is empty")
    return texts


def _plain_texts(path: str) -> list[tuple[str, str]]:
    lines = enumerate(read_lines(path), start=1)
    return [(f"{path}, line {i}", line.removesuffix("\n")) for i, line in lines if line.strip()]


def _json_texts(path: str, *, key: str) -> list[tuple[str, str]]:
    texts = []
    for where, record in read_json_lines(path):
        if key not in record:
            raise ValueError(f'{where}: expected an object with the text under "{key}"')
        texts.append((where, checked_text(record[key], f"{where}: {key}")))
    return texts


def _given(text: str, *, encode: Encode, mask_index: int, key: str) -> list[int]:
    """Tokens of a text that holds no gap; a mask among them would be written over."""
    tokens = encode(text)
    if mask_index in tokens:
        raise ValueError(
            f"{key}: {text[:60]!r} holds the tokenizer's own mask; a gap is [MASK] or [MASK:n], "
            "in sampling.infill"
        )
    return tokens


def prompt_row(
    text: str,
    *,
    encode: Encode,
    bos_index: int,
    mask_index: int,
    length: int,
    max_new_tokens: int | None,
) -> CanvasRow:
    """BOS, the prompt, and room for new tokens up to `length` or `max_new_tokens`.

    Raises:
        ValueError: the prompt leaves no room, or holds a gap `[MASK:n]`. The spelling of a
            special token, and be it `[MASK]`, is text.
    """
    gap = GAP.search(text)
    if gap and gap[1]:
        raise ValueError(
            f"sampling.prompts: {text[:60]!r} holds the marker of a gap; texts with gaps belong "
            "in sampling.infill"
        )
    if gap:
        logger.warning(
            "sampling.prompts: [MASK] in %r is text as any other; gaps belong in sampling.infill",
            text[:60],
        )
    given = _given(text, encode=encode, mask_index=mask_index, key="sampling.prompts")
    tokens = [bos_index, *given]
    if len(tokens) >= length:
        raise ValueError(
            f"sampling.prompts: {text[:60]!r} has {len(tokens)} tokens with BOS, allowed are fewer "
            f"than model.length={length}"
        )
    limit = length if max_new_tokens is None else min(length, len(tokens) + max_new_tokens)
    return CanvasRow(tokens=tokens, limit=limit, source=text)


def gap_row(
    text: str, *, encode: Encode, bos_index: int, mask_index: int, length: int
) -> CanvasRow:
    """BOS and the text, masks in its gaps; it ends where the text ends.

    Raises:
        ValueError: the text does not fit, or holds the tokenizer's mask where it has no gap.
    """
    num_masks = sum(int(gap[1] or 1) for gap in GAP.finditer(text))
    if num_masks >= length:  # and be it a number that fits in no memory
        raise ValueError(
            f"sampling.infill: the gaps of {text[:60]!r} have {num_masks} tokens, allowed with BOS "
            f"and the rest are up to model.length={length}"
        )
    shared = {"encode": encode, "mask_index": mask_index, "key": "sampling.infill"}
    tokens, position = [bos_index], 0
    for gap in GAP.finditer(text):
        tokens += _given(text[position : gap.start()], **shared)
        tokens += [mask_index] * int(gap.group(1) or 1)
        position = gap.end()
    tokens += _given(text[position:], **shared)
    if len(tokens) > length:
        raise ValueError(
            f"sampling.infill: {text[:60]!r} has {len(tokens)} tokens with BOS, allowed are up to "
            f"model.length={length}"
        )
    return CanvasRow(tokens=tokens, limit=len(tokens), source=text)


def stack(
    rows: Sequence[CanvasRow], *, block_size: int, mask_index: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one canvas of whole blocks, and their limits.

    Returns:
        canvas (B, N) int64 and limits (B,) int64.
    """
    limits = torch.tensor([row.limit for row in rows], device=device)
    length = -(-int(limits.max()) // block_size) * block_size
    canvas = torch.full((len(rows), length), mask_index, device=device)
    for number, row in enumerate(rows):
        canvas[number, : len(row.tokens)] = torch.tensor(row.tokens, device=device)
    return canvas, limits
