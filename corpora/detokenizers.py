"""Undo the word-splitting that some benchmark corpora were published with.

WikiText, PTB and LM1B separate punctuation from words (`lobster , or`), mark hyphens and
thousands (`@-@`, `@,@`) and space their quotes. A subword model reads ordinary text, so its
perplexity on those sets is only comparable after the published clean-up rules of the language
modelling literature. A set's rules are an ordered list, because several rules feed later ones;
they are deliberately not improved, since published numbers depend on what they miss too.

Every detokenizer is a plain `str -> str`.
"""

import dataclasses
import re
from collections.abc import Callable

Detokenizer = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Rules:
    """A detokenizer: replacements that are applied one after the other.

    Attributes:
        replacements: (old, new) pairs; `old` is a literal or a compiled regular expression.
    """

    replacements: tuple[tuple[str | re.Pattern, str], ...]

    def __call__(self, text: str) -> str:
        for old, new in self.replacements:
            text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
        return text


def _regex(pattern: str, new: str) -> tuple[re.Pattern, str]:
    return re.compile(pattern), new


wikitext = Rules(
    (
        # the possessive of a plural
        ("s '", "s'"),
        # WikiText's escaped joiners inside words and numbers
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        # punctuation sticks to the word before it
        *((f" {mark} ", f"{mark} ") for mark in (":", ";", ".", "!", "?", ",")),
        # brackets and paired quotes hug what they enclose
        _regex(r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
        _regex(r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        _regex(r"{\s*([^}]*?)\s*}", r"{\1}"),
        _regex(r'"\s*([^"]*?)\s*"', r'"\1"'),
        _regex(r"'\s*([^']*?)\s*'", r"'\1'"),
        # headings, deepest first
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        # no spaces around a line break
        (" \n", "\n"),
        ("\n ", "\n"),
        # the placeholder for a number
        (" N ", " 1 "),
        (" 's", "'s"),
    )
)

lm1b = Rules(
    (
        ("http : / / ", "http://"),
        ("https : / / ", "https://"),
        # clitics: it 's, they 're
        _regex(r" '(\w+)", r"'\1"),
        # full stops after a whole word, in the middle and at the end of the sentence
        _regex(r" (\w+) \. ", r" \1. "),
        _regex(r" (\w+) \.$", r" \1."),
        (" ? ", "? "),
        _regex(r" \?$", "?"),
        (" ! ", "! "),
        _regex(r" !$", "!"),
        *((f" {mark} ", f"{mark} ") for mark in (",", ":", ";")),
        (" / ", "/"),
        # quotes and brackets; the text inside must be non-empty
        _regex(r'" ([^"]+) "', r'"\1"'),
        _regex(r"' ([^']+) '", r"'\1'"),
        _regex(r"\( ([^\(\)]+) \)", r"(\1)"),
        _regex(r"\[ ([^\[\]]+) \]", r"[\1]"),
        ("$ ", "$"),
        ("£ ", "£"),
    )
)

ptb = Rules(
    (
        (" 's", "'s"),
        ("s ' ", "s' "),
        (" n't", "n't"),
        (" \n ", "\n"),
        ("\\/", "/"),
        # PTB writes every number as N; runs such as `N N N` overlap, so they take several passes
        *((" N ", " 1 "),) * 10,
        ("$ 1", "$1"),
        ("# 1", "#1"),
        ("<unk>", "?"),
    )
)

# The papers were split by two conventions, so both rule sets apply.
scientific_papers = Rules(wikitext.replacements + lm1b.replacements)


def lambada(text: str) -> str:
    """Straightens curly double quotes and starts the passage on a new line (GPT-2's form)."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()
