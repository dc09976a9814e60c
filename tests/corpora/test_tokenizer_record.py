"""A checkpoint knows its tokenizer; another one, or a changed one, is not taken for it."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corpora.tokenization import byte_tokenizer, fingerprint, load_tokenizer, train_bpe
from corpora.tokenizer_record import recorded_bpe, tokenizer_record, what_differs
from tests.helpers.small_run import sentences

TEXT = sentences()


def words(*entries: str, lowercase: bool = False, **specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="?")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        backend.normalizer = tokenizers.normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def test_a_bpe_comes_back_as_it_was(tmp_path):
    """With the same ids and the same name in the cache of rows."""
    trained = train_bpe(TEXT, vocab_size=300)
    trained.save_pretrained(tmp_path)
    kept = load_tokenizer(str(tmp_path))
    record = json.loads(json.dumps(tokenizer_record(kept, name="bpe-300")))
    found = recorded_bpe(record, name="bpe-300", source="a.ckpt")
    assert fingerprint(found) == fingerprint(kept) and what_differs(record, kept) is None
    assert found(TEXT[0])["input_ids"] == kept(TEXT[0])["input_ids"]
    assert found.decode(found(TEXT[0])["input_ids"]) == TEXT[0]


def test_other_names_and_older_checkpoints_have_none():
    record = tokenizer_record(byte_tokenizer(), name="bytes")
    assert "rules" not in record
    for said, name in ((record, "bytes"), (record, "bpe-300"), (None, "bpe-300")):
        assert recorded_bpe(said, name=name, source="a.ckpt") is None


@pytest.mark.parametrize("rules", ["", "{}", "[1", None])
def test_a_damaged_record_is_one_line(rules):
    record = tokenizer_record(train_bpe(TEXT, vocab_size=270), name="bpe-270") | {"rules": rules}
    with pytest.raises(ValueError, match="a.ckpt: its bpe-270 cannot be read"):
        recorded_bpe(record, name="bpe-270", source="a.ckpt")
    record["rules"] = byte_tokenizer().backend_tokenizer.to_str()
    with pytest.raises(ValueError, match="a.ckpt: its bpe-270 is damaged"):
        recorded_bpe(record, name="bpe-270", source="a.ckpt")


def test_what_differs_is_said():
    """`bpe-N` of a text that had grown was used with the old weights: nll 5.17 for 4.20."""
    entries = ("?", "the", "The", "quick", "brown")
    record = tokenizer_record(words(*entries), name="words")
    assert what_differs(record, words(*entries)) is None
    assert "4 entries instead of 5" in what_differs(record, words(*entries[:-1]))
    assert "but others" in what_differs(record, words(*entries[:-1], "red"))
    assert "but others" in what_differs(record, words(*entries[:3], "brown", "quick"))
    assert "special tokens" in what_differs(record, words(*entries, bos_token="the"))
    assert "splits text otherwise" in what_differs(record, words(*entries, lowercase=True))


def test_a_grown_text_makes_another_bpe():
    record = tokenizer_record(train_bpe(TEXT, vocab_size=300), name="bpe-300")
    assert what_differs(record, train_bpe([*TEXT, "xyzzy " * 50], vocab_size=300)) is not None
