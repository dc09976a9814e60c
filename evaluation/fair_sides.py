"""Two sets of texts made fit to be compared: equal numbers of them, cut to one length in tokens."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from corpora.lines import without_surrogates
from evaluation.progress import shown

SIMILAR = 0.05  # mean lengths that differ by a smaller share need no remark


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Equally many texts on both sides, each of at most `length` tokens.

    Attributes:
        samples, reference: token ids of each text.
        second: as many other texts of the reference, or none where it has too few.
        length: tokens that texts were cut to.
        decode: makes a text of token ids.
        notes: what was done, a sentence each.
    """

    samples: list[list[int]]
    reference: list[list[int]]
    second: list[list[int]]
    length: int
    decode: Callable[[list[int]], str]
    notes: list[str]

    def texts(self, side: Iterable[list[int]]) -> list[str]:
        """The texts of a side, decoded."""
        # A cut may go through a character of several tokens.
        return [self.decode(ids).rstrip("\ufffd") for ids in side]


def fair_sides(
    samples: Sequence[str],
    reference: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    keeps_special: bool,
    num: int | None = None,
    exact: int | None = None,
) -> Sides:
    """Takes as many texts on both sides, and cuts them to the same greatest length in tokens.

    Args:
        samples, reference: taken in random order (seed 0), since neighbours are on one subject.
        tokenizer: counts and cuts.
        keeps_special: whether tokens such as BOS stay in the texts; otherwise both lose them.
        num: texts on each side, at most; None: as many as there are.
        exact: tokens of every text, shorter ones are left out; None: the longest text of the
            side where that is shorter.

    Raises:
        ValueError: no text of a side is left.
    """
    special = set() if keeps_special else set(tokenizer.all_special_ids)
    special -= {tokenizer.unk_token_id}

    def encode(text: str) -> list[int]:
        ids = tokenizer(
            without_surrogates(text),
            add_special_tokens=False,
            split_special_tokens=False,  # what spells BOS in a sample was BOS
            verbose=False,
        )["input_ids"]
        return [i for i in ids if i not in special]

    p = _take(samples, encode, num=num or len(samples), exact=exact, name="SAMPLES")
    q = _take(reference, encode, num=2 * len(p), exact=exact, name="REFERENCE")
    size = min(len(p), len(q))
    p, q, second = p[:size], q[:size], q[size : 2 * size]
    length = exact or min(max(map(len, p)), max(map(len, q)))
    cut = [[ids[:length] for ids in side] for side in (p, q, second)]
    notes = [
        f"{size:,} texts on each side, of {len(samples):,} samples and {len(reference):,} of the "
        f"reference, cut to at most {length:,} tokens"
        + (", and shorter ones left out" if exact else ""),
        f"special tokens {'stay in' if keeps_special else 'were taken out of'} the texts",
        *_note_on_lengths(cut[0], cut[1]),
    ]
    return Sides(
        samples=cut[0],
        reference=cut[1],
        second=cut[2] if len(second) == size else [],
        length=length,
        decode=tokenizer.decode,
        notes=notes,
    )


def _take(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    num: int,
    exact: int | None,
    name: str,
) -> list[list[int]]:
    """Token ids of `num` texts that are long enough, or of all of these."""
    found: list[list[int]] = []
    order = random.Random(0).sample(range(len(texts)), len(texts))
    for index in shown(order, title=f"Tokenizing {name}"):
        if len(found) == num:
            break
        ids = encode(texts[index])
        if len(ids) >= (exact or 1):
            found.append(ids)
    if not found:
        length = f"--length={exact} tokens; allowed: fewer" if exact else "a token"
        raise ValueError(f"{name}: none of its {len(texts):,} texts has {length}")
    return found


def _note_on_lengths(p: Sequence[Sequence[int]], q: Sequence[Sequence[int]]) -> list[str]:
    """A warning, where one side's texts are longer."""
    means = [sum(map(len, side)) / len(side) for side in (p, q)]
    if abs(means[0] - means[1]) <= SIMILAR * max(means):
        return []
    return [
        f"samples have {means[0]:,.0f} tokens in the mean and the reference {means[1]:,.0f}, on "
        "which MAUVE, entropies and distinct-n depend: --length=N makes them equal, and so does a "
        "reference of rows (data=...)"
    ]
