"""Tokenizers by name: Hugging Face ones, plus characters, bytes and a BPE trained on the spot.

The spelling of a special token inside a text (`[MASK]`) is ordinary characters for all of them, so
that no document can smuggle a mask id into the training data.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import string
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from corpora.lines import without_surrogates
from utils import absolute_path

logger = logging.getLogger(__name__)

# Ids 0..7, then the letters and the space: a file format, since checkpoints depend on it.
_TEXT8_SPECIALS = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
_TEXT8_CHARACTERS = string.ascii_lowercase + " "
_SPECIALS = {
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
_LONG_DOCUMENT = 500_000  # characters
# The library's own record of a token takes over a hundred bytes while it is at it.
_PIECES_PER_CALL = 32
_WORD_BREAK_WORD = re.compile(r"(?<=\S\n)(?=\S)")
_BPE_NAME = re.compile(r"bpe-(\d+)")
# Documents are cut into rows afterwards, so no document is too long for the tokenizer.
_NO_LENGTH_LIMIT = int(1e30)
# The byte alphabet and the special tokens: a BPE of this size has learnt no merge.
SMALLEST_BPE = 256 + len(_SPECIALS)


def load_tokenizer(
    name_or_path: str, *, cache_dir: str | None = None, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that has BOS, EOS and PAD; never runs code from the Hub.

    Args:
        name_or_path: `text8` (35 characters), `bytes` (260 ids), a Hub id, or a local folder.
        cache_dir: where Hub files are kept; None is the Hub's own default.
        local_files_only: read the Hub's cache and never the network.

    Raises:
        ValueError: the name is unknown or unreachable, or the tokenizer lacks the tokens that
            mark the beginning and the end of a text.
    """
    if name_or_path == "text8":
        return text8_tokenizer()
    if name_or_path == "bytes":
        return byte_tokenizer()
    if bpe_size(name_or_path) is not None:
        raise ValueError(
            f"data.tokenizer_name_or_path={name_or_path!r} is trained on the documents of "
            "data.train: build it with dataloader.get_tokenizer, or name the folder it was saved in"
        )
    folder = absolute_path(name_or_path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder if os.path.isdir(folder) else name_or_path,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... here
        raise ValueError(
            f"data.tokenizer_name_or_path={name_or_path!r} could not be loaded. Allowed: text8, "
            "bytes, bpe-<vocabulary size>, a local folder with tokenizer files, or a tokenizer "
            f"on the Hugging Face Hub (https://huggingface.co/{name_or_path}, its tokenizer.json "
            f"or vocabulary files; without a network, give a local folder). Cause: {error}"
        ) from error
    return _with_boundary_tokens(tokenizer, name_or_path)


def _with_boundary_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Fills in BOS and EOS from CLS and SEP, and PAD from EOS."""
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.cls_token or tokenizer.eos_token
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise ValueError(
            f"data.tokenizer_name_or_path={name!r} has no token for the beginning or the end of "
            "a text; allowed are tokenizers with bos_token or cls_token, and eos_token or sep_token"
        )
    if tokenizer.pad_token is None:
        # An existing token: a new one would take the id one past the vocabulary, the mask's.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = _NO_LENGTH_LIMIT
    # Tokenizers in Python would then split the tokens of the user, which are not special, too.
    added = tokenizer.added_tokens_decoder.values()
    tokenizer.split_special_tokens = tokenizer.is_fast or all(token.special for token in added)
    return tokenizer


def mask_index_and_vocab_size(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Returns (mask id, V), where V counts the mask.

    The mask is the tokenizer's own if it has one (BERT: 103 of 30,522), otherwise one id past
    its largest (GPT-2: 50,257 of 50,258). Ids may have gaps, so their number does not tell.
    """
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if tokenizer.mask_token_id is None:
        return size, size + 1
    return tokenizer.mask_token_id, size


def packing_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Returns the (BOS, EOS) ids of packed rows.

    Where a tokenizer marks its texts with [CLS] ... [SEP], both are [CLS]. The published LM1B
    numbers were made so: the original encoded the string "[SEP]", which yields [CLS] [SEP]
    [SEP], and took the first id.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos == tokenizer.cls_token_id and eos == tokenizer.sep_token_id:
        return bos, bos
    return bos, eos


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenizes documents, prompts and the like; no special token comes out but `unk`.

    A document of millions of characters is handed over in pieces, which bounds the memory and
    uses all cores. The tokens are the same for every tokenizer that splits a text into words
    first (GPT-2, BERT and all that are made here).

    Raises:
        ValueError: the tokenizer refuses a text; names it.
    """
    pieces = [list(_pieces(without_surrogates(text))) for text in texts]
    flat = list(itertools.chain.from_iterable(pieces))
    groups = (flat[i : i + _PIECES_PER_CALL] for i in range(0, len(flat), _PIECES_PER_CALL))
    ids = itertools.chain.from_iterable(_ids(tokenizer, group) for group in groups)
    parts = (itertools.islice(ids, len(of_document)) for of_document in pieces)
    documents = [list(itertools.chain.from_iterable(part)) for part in parts]
    specials = _special_ids(tokenizer)
    for number, document in enumerate(documents):
        if not specials.isdisjoint(document):
            documents[number] = _without_specials(tokenizer, document, specials)
    return documents


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    try:
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    except Exception as error:  # such as the one of a word list without `unk`, a bare Exception
        if len(texts) == 1:
            message = f"the tokenizer refuses the text {texts[0][:60]!r}: {error}"
            raise ValueError(message) from error
        return [_ids(tokenizer, [text])[0] for text in texts]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    ids = {number for number, token in added if token.special} | set(tokenizer.all_special_ids)
    return ids - {tokenizer.unk_token_id}


def _without_specials(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], specials: set[int]
) -> list[int]:
    """Puts the characters of their spelling in the place of special tokens.

    `split_special_tokens` does not keep all of them out: what a Unigram or a word list has among
    its pieces is found there (`</s>` of T5), and old tokenizers in Python ignore it (BERT's).
    """
    spelled: dict[int, list[int]] = {}
    for special in specials.intersection(ids):
        characters = list(tokenizer.convert_ids_to_tokens(special))
        if tokenizer.is_fast:  # the model alone puts no space in front of each
            model = tokenizer.backend_tokenizer.model
            parts = [[token.id for token in model.tokenize(c)] for c in characters]
        else:
            parts = _ids(tokenizer, characters)
        spelled[special] = [i for part in parts for i in part if i not in specials]
    return [i for number in ids for i in spelled.get(number, (number,))]


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long document where one line ends, and the next begins, with a word."""
    start = 0
    while len(text) - start > _LONG_DOCUMENT:
        cut = _WORD_BREAK_WORD.search(text, start + _LONG_DOCUMENT)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of everything that decides which ids a text becomes."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two are the state of the last call, not part of the tokenizer.
        rules |= {"truncation": None, "padding": None}
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab()]
    specials = [tokenizer.special_tokens_map, tokenizer.split_special_tokens]
    identity = json.dumps([rules, specials, len(tokenizer)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def text8_tokenizer() -> PreTrainedTokenizerBase:
    """Returns the 35-symbol character tokenizer of text8: a..z, the space and 8 specials."""
    symbols = [*_TEXT8_SPECIALS, *_TEXT8_CHARACTERS]
    # A BPE without merges splits a text into its characters.
    backend = tokenizers.Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="[UNK]")
    )
    backend.decoder = decoders.Fuse()
    return _finish(
        backend,
        **_SPECIALS,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        additional_special_tokens=["[RESERVED]"],
    )


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Returns the tokenizer of UTF-8 bytes: id = byte, then BOS, EOS, PAD and MASK (256..259)."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    vocabulary |= {token: 256 + i for i, token in enumerate(_SPECIALS.values())}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    return _finish(_byte_level(backend, in_words=False), **_SPECIALS)


def bpe_size(name: str) -> int | None:
    """Returns the vocabulary size in `bpe-<size>`, or None where the name is no such name."""
    match = _BPE_NAME.fullmatch(name)
    return int(match[1]) if match else None


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: the training documents.
        vocab_size: number of ids, special tokens included; at least `SMALLEST_BPE`.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(
            f"data.tokenizer_name_or_path='bpe-{vocab_size}': the vocabulary must have at least "
            f"{SMALLEST_BPE} entries, the 256 bytes and {len(_SPECIALS)} special tokens"
        )
    backend = _byte_level(tokenizers.Tokenizer(models.BPE()), in_words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIALS.values()),
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            "The training text yields only %d of the %d entries of bpe-%d.",
            backend.get_vocab_size(),
            vocab_size,
            vocab_size,
        )
    return _finish(backend, **_SPECIALS)


def bpe_of_rules(rules: str) -> PreTrainedTokenizerBase:
    """Returns the BPE of `train_bpe` whose backend wrote itself down (`to_str`) as `rules`."""
    return _finish(tokenizers.Tokenizer.from_str(rules), **_SPECIALS)


def _byte_alphabet() -> list[str]:
    """Returns GPT-2's printable stand-in for each byte, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    replacements: Iterator[str] = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(replacements) for byte in range(256)]


def _byte_level(backend: tokenizers.Tokenizer, *, in_words: bool) -> tokenizers.Tokenizer:
    """Makes a BPE work on the bytes of a text, so that decoding gives the text back exactly.

    `in_words`: split into GPT-2's words first, which merges then never cross.
    """
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=in_words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _finish(backend: tokenizers.Tokenizer, **special_tokens) -> PreTrainedTokenizerBase:
    """Wraps a backend for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=_NO_LENGTH_LIMIT,
        **special_tokens,
    )
