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
        ('{"prompt": "a"}\n{"prompt"', "prompts.jsonl:2: not JSON"),
        ('{"text": "a"}', 'prompts.jsonl:1: expected an object with the text under "prompt"'),
        ("[1]", "prompts.jsonl:1: expected an object"),
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
    with pytest.raises(ValueError, match="prompts.txt: not UTF-8"):
        read_prompts(str(path))
    with pytest.raises(FileNotFoundError):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(OSError, match="cannot be read as a file of prompts .*directory"):
        read_prompts(str(tmp_path))


def test_a_text_without_a_gap_is_an_error(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_text('{"text": "a [MASK] b"}\n\n{"text": "none"}\n')
    with pytest.raises(ValueError, match="gaps.jsonl:3: no gap in this text; write \\[MASK"):
        read_gap_texts(str(path))


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
