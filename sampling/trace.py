"""A page that replays how a sampler filled its rows.

The page is one file without external resources. It holds, for each row, the text of the tokens,
the pass in which each was revealed and its probability at that moment, as JSON.
"""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils import json_text

from .base import SamplerOutput

TEMPLATE = Path(__file__).with_name("trace.html")
MAX_ROWS = 256  # a page of more is too large to be of use
Decode = Callable[[Sequence[int]], str]
TraceRow = dict[str, Any]


def token_texts(tokens: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to the one before it.

    A tokenizer of words decodes a word alone without the space before it, so a token is decoded
    with its left neighbour too. A part of a character is the replacement character.
    """
    alone = [decode(tokens[i : i + 1]) for i in range(len(tokens))]
    texts = alone[:1]
    for i in range(1, len(tokens)):
        pair = decode(tokens[i - 1 : i + 1])
        is_longer = pair.startswith(alone[i - 1])
        texts.append(pair[len(alone[i - 1]) :] if is_longer else alone[i])
    return texts


def trace_rows(output: SamplerOutput, decode: Decode, *, first_row: int = 0) -> list[TraceRow]:
    """What the page needs to know of each row, up to its length.

    Args:
        output: B rows.
        decode: token ids to text.
        first_row: number of the first row; rows are named from 1.

    Returns:
        Per row its `name`, `tokens` (texts), `revealed_at` (passes from 1, 0 if given),
        `confidence`, `num_steps` and whether it was `accepted`.
    """
    tokens, revealed_at = output.tokens.tolist(), output.revealed_at.tolist()
    confidence = output.confidence.double().nan_to_num().tolist()
    return [
        {
            "name": f"sample {first_row + i + 1}",
            "tokens": token_texts(tokens[i][:n], decode),
            "revealed_at": revealed_at[i][:n],
            "confidence": [round(p, 4) for p in confidence[i][:n]],
            "num_steps": max(revealed_at[i][:n], default=0),
            "accepted": bool(output.accepted[i]),
        }
        for i, n in enumerate(output.lengths.tolist())
    ]


class Trace:
    """Collects the rows of batches for one page.

    Args:
        title: of the page.
        decode: token ids to text.
    """

    def __init__(self, *, title: str, decode: Decode):
        self.rows: list[TraceRow] = []
        self._title, self._decode = title, decode

    def add(self, output: SamplerOutput, *, first_row: int) -> bool:
        """Add a batch, see `trace_rows`; False where `MAX_ROWS` are there already."""
        if len(self.rows) >= MAX_ROWS:
            return False
        self.rows += trace_rows(output, self._decode, first_row=first_row)
        del self.rows[MAX_ROWS:]
        return True

    def page(self) -> str:
        """The page as HTML."""
        return render_page(self.rows, title=self._title)


def render_page(rows: Sequence[TraceRow], *, title: str) -> str:
    """The page of these rows.

    Any text is safe: JSON inside a script element may hold no `<`, and is pure ASCII.
    """
    data = json_text({"rows": rows}, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    values = {"__TITLE__": html.escape(title), "__DATA__": data}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub("|".join(values), lambda match: values[match[0]], template)
