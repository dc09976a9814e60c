"""What shows how a text came about: the page that replays it, and the terminal."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

from corpora.tokenization import load_tokenizer
from models.masks import AttentionPattern
from sampling import live, trace
from sampling.base import SamplerOutput
from sampling.live import SamplingDisplay
from sampling.prompts import CanvasRow
from sampling.semi_ar import SemiAutoregressiveSampler
from sampling.stopping import StopRule
from sampling.trace import Trace, render_page, token_texts, trace_rows
from tests.helpers.toys import MASK, TableDenoiser, canvas

EVIL = {
    0: "</script><script>alert(1)</script>",
    1: "a\n\tb\u2028",
    2: "__DATA__ <!-- & é 漢 \ud800",
}


def decode(tokens) -> str:
    return "".join(EVIL[token] for token in tokens)


def sampled(on_step=None) -> SamplerOutput:
    """Three rows of four tokens in blocks of two; the second token of the last row is given."""
    sampler = SemiAutoregressiveSampler(
        block_size=2,
        mask_index=MASK,
        pad_index=0,
        pattern=AttentionPattern.BLOCK_CAUSAL,
        stop=StopRule(min_entropy=None),
    )
    given = canvas(3, 4)
    given[2, 1] = 2
    limits = torch.tensor([4, 3, 4])
    generator = torch.Generator().manual_seed(1)
    return sampler.sample(
        TableDenoiser(), given, limits=limits, generator=generator, on_step=on_step
    )


def data_in(page: str) -> dict:
    """Returns the JSON of a page, cut out as a browser does it: up to the first end tag."""
    start = page.index(opening := '<script id="trace" type="application/json">') + len(opening)
    return json.loads(page[start : page.index("</script", start)])


def test_page_holds_what_the_sampler_did():
    output = sampled()
    rows = data_in(render_page(trace_rows(output, decode, first_row=8), title="t"))["rows"]
    assert [row["name"] for row in rows] == ["sample 9", "sample 10", "sample 11"]
    assert [len(row["tokens"]) for row in rows] == output.lengths.tolist() == [4, 3, 4]
    for i, row in enumerate(rows):
        n = len(row["tokens"])
        assert row["tokens"] == [EVIL[token] for token in output.tokens[i, :n].tolist()]
        assert row["revealed_at"] == output.revealed_at[i, :n].tolist()
        assert row["confidence"] == pytest.approx(output.confidence[i, :n].tolist(), abs=1e-4)
        assert row["num_steps"] == output.num_denoising_passes[i]
        assert row["accepted"] is True


def test_no_mask_remains_at_the_last_step():
    """A token is a mask on the page while the step is below `revealed_at`; given ones never are."""
    for row, given in zip(trace_rows(sampled(), decode), (1, 1, 2), strict=True):
        assert max(row["revealed_at"]) == row["num_steps"]
        assert row["revealed_at"].count(0) == given
        assert set(row["revealed_at"]) == set(range(row["num_steps"] + 1))


def test_any_text_is_safe():
    """Tokens may spell end tags, comments and the names of the template's fields."""
    page = render_page(trace_rows(sampled(), decode), title="<b>__DATA__ & 'x'")
    data, plain = data_in(page), render_page([], title="x")
    assert {text for row in data["rows"] for text in row["tokens"]} <= set(EVIL.values())
    assert page.count("<script") == plain.count("<script")
    assert page.count("</script") == plain.count("</script")
    assert "<title>&lt;b&gt;__DATA__ &amp; &#x27;x&#x27;</title>" in page
    page.encode()  # lone surrogates are escaped


def test_page_needs_nothing_from_outside():
    page = render_page([], title="x")
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc=|@import|url\(", page)
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]


def test_token_texts_join_to_the_text():
    """Words of BERT's kind get the space that stands before them, and pieces none."""
    bytes_ = load_tokenizer("bytes")
    tokens = bytes_("two\nlines", add_special_tokens=False)["input_ids"]
    assert token_texts(tokens, bytes_.decode) == list("two\nlines")
    words = {0: "play", 1: "##ing", 2: "chess"}

    def join(ids):
        return " ".join(words[i] for i in ids).replace(" ##", "")

    assert token_texts([2, 0, 1, 2], join) == ["chess", " play", "ing", " chess"]
    assert token_texts([], join) == []


def test_a_page_takes_a_limited_number_of_rows(monkeypatch):
    monkeypatch.setattr(trace, "MAX_ROWS", 4)
    page = Trace(title="t", decode=decode)
    assert [page.add(sampled(), first_row=first) for first in (0, 3, 6)] == [True, True, False]
    assert [row["name"] for row in data_in(page.page())["rows"]][-1] == "sample 4"


def display(*, is_terminal: bool, shows_rows: bool = True, **settings) -> SamplingDisplay:
    """A display of the rows of `sampled`, into a string."""
    given = [[0], [0], [0, 2]]
    rows = [CanvasRow(tokens=t, limit=n, source="") for t, n in zip(given, (4, 3, 4), strict=True)]
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=90, height=60)
    shown = SamplingDisplay(
        rows, mask_index=MASK, decode=decode_letters, shows_rows=shows_rows, console=console,
        **settings,
    )  # fmt: skip
    shown.rows, shown.file = rows, file
    return shown


def decode_letters(tokens) -> str:
    return "".join("xyz"[token] for token in tokens)


@pytest.mark.parametrize("settings", [{"is_terminal": False}, {"is_terminal": True,
                                                               "is_quiet": True}])  # fmt: skip
def test_nothing_is_drawn_where_nobody_looks(settings):
    """A sampler without a terminal is not called back, so that it loses no time."""
    shown = display(**settings)
    with shown:
        assert shown.begin(shown.rows) is None
    assert shown.file.getvalue() == ""


@pytest.mark.parametrize("shows_rows", [False, True])
def test_terminal_shows_progress_and_rows(monkeypatch, shows_rows):
    monkeypatch.setattr(live, "SECONDS_PER_FRAME", 0.0)
    shown = display(is_terminal=True, shows_rows=shows_rows)
    with shown:
        output = sampled(on_step=shown.begin(shown.rows))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.file.getvalue())
    assert "100%" in text and "tokens/s" in text and "left" in text
    assert ("tokens 1 to 3 of 3" in text) == shows_rows
    assert (live.MASK in text) == shows_rows
    assert (f" {decode_letters(output.tokens[2].tolist())} " in text) == shows_rows


def test_terminal_follows_rows_that_are_drawn_again(monkeypatch):
    """A retry has fewer rows, and a step of it may show more masks than the step before."""
    monkeypatch.setattr(live, "SECONDS_PER_FRAME", 0.0)
    shown = display(is_terminal=True)
    with shown:
        on_step = shown.begin(shown.rows)
        sampled(on_step)
        on_step(torch.tensor([[0, MASK, 1, MASK]]))
        on_step(torch.tensor([[0, 2, 1, MASK]]))
    assert "x░░y░░" in re.sub(r"\x1b\[[0-9;]*m", "", shown.file.getvalue())
