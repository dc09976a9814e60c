"""What a checkpoint says of its tokenizer, and whether another one is the same.

Compared is what a tokenizer does, not how its files spell it, which differs between versions of
the libraries: the ids of all its entries, its special tokens, and how it splits a sample of text.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from corpora.tokenization import bpe_of_rules, bpe_size, encode

_SPECIALS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
# Case, accents, digits, code, spaces, line ends, scripts without spaces: where splitting differs.
_SAMPLE = (
    "The quick brown foxes' 3,141.59 jumps — isn't it?  Déjà-vu\u0301 naïve STRASSE Straße "
    "ﬁnd №5\n\n\tdef f(x_0):\r\n    return x_0 ** 2  # ∑ über 10^6\u00a0€; \u65e5\u672c\u8a9e "
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628 \U0001f600 "
)


def tokenizer_record(tokenizer: PreTrainedTokenizerBase, *, name: str) -> dict[str, Any]:
    """What is kept of a tokenizer: plain strings and numbers.

    Args:
        tokenizer: of the run.
        name: `data.tokenizer_name_or_path`. A `bpe-N`, which is made of the training text and
            would be another one with another text, is kept as a whole.
    """
    record = {
        "name": name,
        "num_entries": len(tokenizer),
        "entries": _hash(sorted(tokenizer.get_vocab().items())),
        "specials": [getattr(tokenizer, key) for key in _SPECIALS],
        "splits": _hash(encode(tokenizer, [_SAMPLE])),
    }
    if bpe_size(name) is not None:
        record["rules"] = tokenizer.backend_tokenizer.to_str()
    return record


def recorded_bpe(
    record: Mapping[str, Any] | None, *, name: str, source: str
) -> PreTrainedTokenizerBase | None:
    """The very `bpe-N` of a record; None where it has none of this name.

    Args:
        record: see `tokenizer_record`; None: there is none.
        name: `data.tokenizer_name_or_path`.
        source: the checkpoint, for messages.

    Raises:
        ValueError: the record is damaged.
    """
    if record is None or bpe_size(name) is None or record.get("name") != name:
        return None
    try:
        tokenizer = bpe_of_rules(record["rules"])
    except Exception as error:  # the library knows one class of error
        raise ValueError(f"{source}: its {name} cannot be read ({error})") from error
    differs = what_differs(record, tokenizer)
    if differs is not None:
        raise ValueError(f"{source}: its {name} is damaged ({differs})")
    return tokenizer


def what_differs(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How a tokenizer differs from the recorded one, in words; None where it does not."""
    own = tokenizer_record(tokenizer, name="")
    if record.get("num_entries") != own["num_entries"]:
        return f"it has {own['num_entries']} entries instead of {record.get('num_entries')}"
    if record.get("entries") != own["entries"]:
        return f"it has as many entries ({own['num_entries']}), but others"
    if record.get("specials") != own["specials"]:
        return f"its special tokens are {own['specials']} instead of {record.get('specials')}"
    if record.get("splits") != own["splits"]:
        return "it has the same entries, but splits text otherwise"
    return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
