"""The spelling of a special token in a text is ordinary characters, whatever the tokenizer.

One line "[MASK]" in the documents of a BERT-like tokenizer made the mask's id, to which the model
gives e to the -1e6: a loss of 5,668 instead of 8, and a perplexity of infinity.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from corpora.packing import RowMaker
from corpora.tokenization import (
    _byte_alphabet,
    encode,
    load_tokenizer,
    mask_index_and_vocab_size,
    train_bpe,
)

SPECIALS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
    "unk_token": "<unk>",
}
TEXT = "say [MASK] and </s> <s> <pad>[MASK]<|tool|>y [CLS][SEP] [PAD]  [BOS] <|endoftext|> end"
PIECES = [*SPECIALS.values(), *sorted(set(TEXT) - {" "}), "▁"]
IDS = {piece: number for number, piece in enumerate(PIECES)}


def wrapped(backend: tokenizers.Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIALS
    )


def word_list() -> PreTrainedTokenizerBase:
    backend = tokenizers.Tokenizer(models.WordLevel(IDS | {"say": len(IDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend)


def unigram() -> PreTrainedTokenizerBase:
    """As those of T5 and XLM-R: special tokens are the likeliest of its pieces."""
    pieces = [(piece, 0.0 if i < len(SPECIALS) else -5.0) for i, piece in enumerate(PIECES)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=4))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return wrapped(backend)


def whole_words_first() -> PreTrainedTokenizerBase:
    """As those of Llama 3: a word that is in the vocabulary is its entry, merges or not."""
    alphabet = {c: i for i, c in enumerate([*SPECIALS.values(), *_byte_alphabet()])}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def with_added_tokens() -> PreTrainedTokenizerBase:
    """The mask is added as an ordinary token, <|tool|> as a special one without a role."""
    alphabet = {c: i for i, c in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=False) for token in ("[MASK]", "say")])
    backend.add_special_tokens(["<|tool|>"])
    return wrapped(backend)


FAST = [word_list, unigram, whole_words_first, with_added_tokens]


def check(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """No special id but that of unknown words comes out, in other processes either."""
    (ids,) = encode(tokenizer, [TEXT])
    added = tokenizer.added_tokens_decoder
    specials = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    assert not (specials - {tokenizer.unk_token_id}) & set(ids)
    assert encode(pickle.loads(pickle.dumps(tokenizer)), [TEXT, "", TEXT]) == [ids, [], ids]
    row_maker = RowMaker(tokenizer=tokenizer, length=8, insert_special=False, insert_eos=False)
    assert mask_index_and_vocab_size(tokenizer)[0] not in row_maker([TEXT] * 3).ids
    return ids


@pytest.mark.parametrize("make", FAST)
@pytest.mark.parametrize("splits", [True, False, None])
def test_fast_tokenizers(tmp_path: Path, make: Callable, splits: bool | None):
    """Whatever the tokenizer's own files say of it."""
    saved = make()
    if splits is not None:
        saved.init_kwargs["split_special_tokens"] = splits
    saved.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    ids = check(tokenizer)
    if make is not word_list:  # to which most of the text is unknown
        assert tokenizer.decode(ids) == TEXT
    if make is with_added_tokens:  # not special: stays one token
        assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["say", "Ġ"]


@pytest.mark.parametrize("make", FAST)
def test_ordinary_text_is_as_it_was(make: Callable):
    tokenizer = make()
    text = "say end yes </> [M]"
    assert encode(tokenizer, [text]) == [tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_those_that_are_made_here(tmp_path: Path):
    for tokenizer in (train_bpe([TEXT], vocab_size=270), load_tokenizer("bytes")):
        assert tokenizer.decode(check(tokenizer)) == TEXT
    check(load_tokenizer("text8"))


def test_those_of_the_published_models(gpt2, bert):
    assert gpt2.decode(check(gpt2)) == TEXT
    assert bert.decode(check(bert)).startswith("say [ mask ] and < / s >")


def test_tokenizers_in_python(tmp_path: Path):
    """BERT's old one ignores `split_special_tokens`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "say", *"[]<>/|maskpdeny"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    old_bert = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not old_bert.is_fast
    for split in (True, False):
        old_bert.split_special_tokens = split
        ids = check(old_bert)
        assert old_bert.convert_ids_to_tokens(ids[:7]) == ["say", *"[mask]"]
    check(transformers.ByT5Tokenizer())


def test_tokens_of_the_user_stay_whole_in_tokenizers_in_python(tmp_path: Path):
    tokenizer = transformers.ByT5Tokenizer(bos_token="<s>", extra_ids=0)
    tokenizer.add_tokens(["<name>"])
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert not tokenizer.is_fast
    (ids,) = encode(tokenizer, ["a<name></s>"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<name>", *"</s>"]


def test_what_a_tokenizer_refuses_is_named():
    """A word list without a token for unknown words raises a bare Exception."""
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "say": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(ValueError, match="the tokenizer refuses the text 'say what': .*UNK"):
        encode(tokenizer, ["say say", "say what", ""])


def test_half_an_emoji():
    tokenizer = load_tokenizer("bytes")
    assert encode(tokenizer, ["a\ud83db"]) == encode(tokenizer, ["a\ufffdb"])


def with_gaps(*, has_mask: bool) -> PreTrainedTokenizerBase:
    """Ids 0..4 and 10..265, as those of cl100k have gaps."""
    names = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3} | ({"[MASK]": 4} if has_mask else {})
    alphabet = {c: 10 + i for i, c in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(names | alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    roles = {role: token for role, token in SPECIALS.items() if token in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.mark.parametrize("has_mask", [True, False])
def test_gaps_in_the_ids(tmp_path: Path, has_mask: bool):
    """The number of tokens gave the mask the id of an ordinary one, and those behind none."""
    with_gaps(has_mask=has_mask).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    mask, size = mask_index_and_vocab_size(tokenizer)
    assert (mask, size) == ((4, 266) if has_mask else (266, 267))
    (ids,) = encode(tokenizer, ["aÿ \xff" + TEXT])
    assert mask not in ids and max(ids) < size
    # A model may draw what no text has.
    assert tokenizer.decode([10 + ord("a"), 7, 10 + ord("b")]) == "ab"
