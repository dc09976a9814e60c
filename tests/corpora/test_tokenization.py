"""Tokenizers: ids that checkpoints depend on, lossless bytes, BPE, masks and special tokens."""

from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from corpora import tokenization
from corpora.tokenization import (
    encode,
    fingerprint,
    load_tokenizer,
    mask_index_and_vocab_size,
    packing_ids,
    train_bpe,
)

HARD_TEXT = "[MASK][BOS] héllo\t\n 日本 👩‍👩‍👧 \x00 'tis n't .  [EOS]\r\n<|endoftext|>"


def test_text8_ids():
    tokenizer = load_tokenizer("text8")
    symbols = ["[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
    symbols += "abcdefghijklmnopqrstuvwxyz "
    assert tokenizer.convert_ids_to_tokens(list(range(35))) == symbols
    assert mask_index_and_vocab_size(tokenizer) == (4, 35)
    assert packing_ids(tokenizer) == (2, 3)
    assert encode(tokenizer, ["ab z", "é", ""]) == [[8, 9, 34, 33], [7], []]
    assert tokenizer.decode([8, 9, 34, 33]) == "ab z"


def test_text8_ids_are_those_of_the_original_checkpoints(shared: Path):
    """The rows on which the original's checkpoints were measured read as text8."""
    rows = load_file(shared / "golden/lightning/ar_text8.expected.safetensors")["x0"]
    text = (shared / "data/text8/text8.prefix742809").read_text()
    tokenizer = load_tokenizer("text8")
    for row in rows[:5]:
        assert tokenizer.decode(row) in text


@pytest.mark.parametrize("make", [lambda: load_tokenizer("bytes"), lambda: train_bpe(
    ["the cat sat on the mat " * 9], vocab_size=264)], ids=["bytes", "bpe"])  # fmt: skip
def test_byte_level_tokenizers_are_lossless(make):
    """A special token's name in a document is text: it must not put mask ids into the data."""
    tokenizer = make()
    (ids,) = encode(tokenizer, [HARD_TEXT])
    assert tokenizer.decode(ids) == HARD_TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == HARD_TEXT
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_bytes_ids():
    tokenizer = load_tokenizer("bytes")
    assert encode(tokenizer, ["aé"]) == [list("aé".encode())]
    assert mask_index_and_vocab_size(tokenizer) == (259, 260)
    assert packing_ids(tokenizer) == (256, 257)


def test_bpe_is_reproducible_and_survives_saving(tmp_path: Path):
    texts = [f"tokenization of document number {i}, and then some more" for i in range(50)]
    first, second = (train_bpe(texts, vocab_size=300) for _ in range(2))
    assert len(first) == 300
    first.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert fingerprint(first) == fingerprint(second) == fingerprint(loaded)
    assert encode(loaded, [HARD_TEXT]) == encode(first, [HARD_TEXT])


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="bpe-200.*at least 260"):
        train_bpe(["text"], vocab_size=200)


def test_bert(bert):
    """BERT's packed rows end in [CLS]: the original took the first id of encoding "[SEP]",
    which is [CLS] [SEP] [SEP]. The published LM1B numbers depend on it, so it stays."""
    assert packing_ids(bert) == (101, 101)
    assert (bert.bos_token_id, bert.eos_token_id) == (101, 102)
    assert mask_index_and_vocab_size(bert) == (103, 30522)


def test_gpt2_pad_is_not_its_mask(gpt2):
    """The original added a PAD token to GPT-2, which took id 50257: the mask's. Without
    wrapping, every padded position then looked masked to the network."""
    assert packing_ids(gpt2) == (50256, 50256)
    assert mask_index_and_vocab_size(gpt2) == (50257, 50258)
    assert gpt2.pad_token_id == 50256


def test_fingerprint_ignores_the_state_of_the_last_call(gpt2, bert):
    before = fingerprint(gpt2)
    gpt2(["some text"], max_length=3, truncation=True, padding="max_length")
    assert fingerprint(gpt2) == before != fingerprint(bert)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_long_documents_in_pieces_give_the_same_tokens(
    shared: Path, request, monkeypatch, name: str
):
    tokenizer = request.getfixturevalue(name)
    text = (shared / "data/warandpeace/warandpeace.txt").read_text()[:300_000]
    whole = encode(tokenizer, [text, "short", ""])
    monkeypatch.setattr(tokenization, "_LONG_DOCUMENT", 20_000)
    assert len(list(tokenization._pieces(text))) > 10
    assert encode(tokenizer, [text, "short", ""]) == whole
    monkeypatch.setattr(tokenization, "_PIECES_PER_CALL", 4)
    assert encode(tokenizer, [text, "short", ""]) == whole


def test_unknown_name_says_what_is_allowed(monkeypatch):
    def refuse(name: str, **options):
        assert options["trust_remote_code"] is False
        raise OSError("no such repository")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="tokenizer_name_or_path='gtp2'.*text8, bytes, bpe-"):
        load_tokenizer("gtp2")


def test_bpe_by_name_alone_is_an_error():
    with pytest.raises(ValueError, match="trained on the documents of data.train"):
        load_tokenizer("bpe-1024")
