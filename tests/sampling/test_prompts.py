"""Prompt and gap files become canvases; what is broken in them is named."""

import gzip
import json

import pytest
import torch

from sampling.prompts import gap_row, prompt_row, read_gap_texts, read_prompts, stack

BOS, MASK = 0, 255
SHARED = {
    "encode": lambda text: [MASK if c == "?" else ord(c) for c in text],  # ? is its own mask
    "bos_index": BOS,
    "mask_index": MASK,
}


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("One.\n\n  two\n")
    assert read_prompts(str(path)) == ["One.", "  two"]


def test_prompts_of_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\nb", "id": 3}) + "\n")
    assert read_prompts(str(path)) == ["a\nb"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt"', "prompts.jsonl, line 2: not JSON"),
        ('{"text": "a"}', 'prompts.jsonl, line 1: expected an object with the text under "prompt"'),
        ('{"prompt": 7}', "prompts.jsonl, line 1: prompt must hold text, not 7"),
        ("[1]", "prompts.jsonl, line 1: no JSON object"),
        ("\n\n", "prompts.jsonl: the file is empty"),
    ],
)
def test_broken_files_are_named(content, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_not_utf8_and_missing(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(gzip.compress(b"x") + b"\xff\xfe")
    with pytest.raises(ValueError, match="prompts.txt, line 1: not UTF-8"):
        read_prompts(str(path))
    with pytest.raises(FileNotFoundError):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="cannot be read: .*directory"):
        read_prompts(str(tmp_path))


def test_a_text_without_a_gap_is_an_error(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_text('{"text": "a [MASK] b"}\n\n{"text": "none"}\n')
    with pytest.raises(ValueError, match="gaps.jsonl, line 3: no gap in this text; write \\[MASK"):
        read_gap_texts(str(path))


@pytest.mark.parametrize("gap", ["[MASK:0]", "[MASK:000]", "[MASK:-1]", "[MASK:]", "[MASK:x]"])
def test_a_gap_of_no_token_is_an_error(gap, tmp_path):
    """The samples were drawn, and then the passes per new token divided by zero."""
    path = tmp_path / "gaps.jsonl"
    path.write_text(f'{{"text": "a [MASK] b"}}\n{{"text": "a {gap} [MASK]"}}\n')
    with pytest.raises(ValueError, match="gaps.jsonl, line 2: '.MASK:.* is no gap; .* n from 1"):
        read_gap_texts(str(path))
    path.write_text('{"text": "a[MASK:010]"}\n')
    assert read_gap_texts(str(path)) == ["a[MASK:010]"]


def test_a_gap_larger_than_any_memory_is_an_error():
    with pytest.raises(ValueError, match="have 9{18} tokens, allowed .* model.length=50"):
        gap_row(f"a[MASK:{'9' * 18}]", length=50, **SHARED)


def test_files_as_windows_writes_them(tmp_path):
    """The first prompt began with U+FEFF, and JSON was refused for it."""
    for name, lines in (("p.txt", "a\r\nb\r\n"), ("p.jsonl", '{"prompt": "a"}\r\n{"prompt": "b"}')):
        (tmp_path / name).write_bytes(f"\ufeff{lines}".encode())
        assert read_prompts(str(tmp_path / name)) == ["a", "b"]


def test_lines_end_at_newlines_alone(tmp_path):
    """Other characters that Python takes for line ends cut prompts in two, and JSON in its
    middle."""
    text = "a\u2028b\x85c\x0cd"
    (tmp_path / "p.txt").write_bytes(f"{text}\n{text}".encode())
    assert read_prompts(str(tmp_path / "p.txt")) == [text, text]
    record = json.dumps({"prompt": text, "text": f"{text}[MASK]"}, ensure_ascii=False)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(record.encode()))
    assert read_prompts(str(tmp_path / "p.jsonl.gz")) == [text]
    assert read_gap_texts(str(tmp_path / "p.jsonl.gz")) == [f"{text}[MASK]"]


def test_prompt_row_leaves_room_for_new_tokens():
    row = prompt_row("abc", length=10, max_new_tokens=None, **SHARED)
    assert row.tokens == [BOS, 97, 98, 99] and row.limit == 10
    assert prompt_row("abc", length=10, max_new_tokens=2, **SHARED).limit == 6
    assert prompt_row("abc", length=5, max_new_tokens=9, **SHARED).limit == 5


@pytest.mark.parametrize("text", ["abcd", "abcdefgh"])
def test_a_prompt_that_fills_the_window_is_an_error(text):
    with pytest.raises(ValueError, match="allowed are fewer than model.length=5"):
        prompt_row(text, length=5, max_new_tokens=None, **SHARED)


def test_a_marker_in_a_prompt_is_an_error():
    with pytest.raises(ValueError, match="belong in sampling.infill"):
        prompt_row("a [MASK:3]", length=50, max_new_tokens=None, **SHARED)


def test_a_special_token_in_a_prompt_is_text(caplog):
    """[MASK] too, which a user may have meant as a gap."""
    row = prompt_row("a [MASK]", length=50, max_new_tokens=None, **SHARED)
    assert row.tokens == [BOS, *map(ord, "a [MASK]")]
    assert "gaps belong in sampling.infill" in caplog.text


def test_the_tokenizers_own_mask_is_an_error():
    """It would become a token to write: in a prompt, and as one more gap."""
    with pytest.raises(ValueError, match="prompts: 'a\\?b' holds the tokenizer's own mask"):
        prompt_row("a?b", length=50, max_new_tokens=None, **SHARED)
    for text in ("a?[MASK]b", "a[MASK]b?"):
        with pytest.raises(ValueError, match="sampling.infill: .*\\?.* the tokenizer's own mask"):
            gap_row(text, length=50, **SHARED)


def test_gap_row():
    row = gap_row("a[MASK]b[MASK:3]", length=10, **SHARED)
    assert row.tokens == [BOS, 97, MASK, 98, MASK, MASK, MASK] and row.limit == 7
    with pytest.raises(ValueError, match="has 7 tokens with BOS, allowed are up to"):
        gap_row("a[MASK]b[MASK:3]", length=6, **SHARED)


def test_rows_of_different_lengths_make_whole_blocks():
    rows = [
        prompt_row("abc", length=10, max_new_tokens=2, **SHARED),
        gap_row("[MASK]z", length=10, **SHARED),
    ]
    canvas, limits = stack(rows, block_size=4, mask_index=MASK, device=torch.device("cpu"))
    assert limits.tolist() == [6, 3]
    assert canvas.tolist() == [
        [BOS, 97, 98, 99, MASK, MASK, MASK, MASK],
        [BOS, MASK, 122, MASK, MASK, MASK, MASK, MASK],
    ]
