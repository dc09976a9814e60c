"""Canvases from files: prompts to go on from, and texts with gaps to fill.

A prompt file is plain text with a prompt per line, or JSON Lines with the key `prompt`. A file of
gaps is JSON Lines with the key `text`; in it `[MASK]` stands for one token to fill, `[MASK:n]` for
n of them.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import fsspec
import torch
from torch import Tensor

GAP = re.compile(r"\[MASK(?::(\d+))?\]")
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
    """The prompts of a file.

    Raises:
        ValueError: an empty file, or a broken line (named as file:line).
        FileNotFoundError: there is no such file.
    """
    return _read(path, key="prompt", is_json=path.endswith((".jsonl", ".json")))


def read_gap_texts(path: str) -> list[str]:
    """The texts with gaps of a JSON Lines file; errors as in `read_prompts`."""
    return _read(path, key="text", is_json=True, has_gaps=True)


def _read(path: str, *, key: str, is_json: bool, has_gaps: bool = False) -> list[str]:
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such file of {key}s") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read as a file of {key}s ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        texts.append(_json_field(line, key=key, where=where) if is_json else line)
        if has_gaps and not GAP.search(texts[-1]):
            raise ValueError(f"{where}: no gap in this text; write [MASK] or [MASK:n] in it")
    if not texts:
        raise ValueError(f"{path}: the file is empty")
    return texts


def _json_field(line: str, *, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise ValueError(f'{where}: expected an object with the text under "{key}"')
    return record[key]


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
        ValueError: the prompt leaves no room, or holds a gap marker or the tokenizer's mask.
    """
    if GAP.search(text):
        raise ValueError(
            f"sampling.prompts: {text[:60]!r} holds the marker of a gap; texts with gaps belong "
            "in sampling.infill"
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
