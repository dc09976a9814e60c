"""Checks of `data.json` (packed rows of real documents) and `detokenizers.json`."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from corpora import detokenizers
from corpora.local_files import find_files, read_documents
from corpora.packing import DOCUMENTS_PER_BATCH, RowMaker
from corpora.registry import get_spec
from corpora.tokenization import load_tokenizer
from tests.parity.rows import Row

# Where the documents of `data.json` lie below `data/`.
DOCUMENTS = {
    "wikitext2": "wikitext-2/valid.txt",
    "lm1b": "lm1b/news.en.heldout-00000-of-00050",
    "lambada": "lambada/lambada_test.jsonl",
}
TOKENIZERS = {"gpt2": "tokenizers/gpt2", "bert": "tokenizers/bert-base-uncased"}
DETOKENIZERS = {
    "wt": detokenizers.wikitext,
    "lm1b": detokenizers.lm1b,
    "lambada": detokenizers.lambada,
    "ptb": detokenizers.ptb,
    "scientific_papers": detokenizers.scientific_papers,
}
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def detokenizer_rows(path: Path) -> Iterator[Row]:
    """Unequal outputs per rule set."""
    for name, pairs in json.loads(path.read_text()).items():
        unequal = sum(DETOKENIZERS[name](text) != expected for text, expected in pairs)
        yield Row(path.name, f"{name}: unequal of {len(pairs)}", float(unequal), 0.0)


@functools.cache
def first_documents(file: Path, *, dataset: str, count: int) -> list[str]:
    """The first documents of a local copy, read as the framework reads it."""
    spec = get_spec(dataset, key="data.valid")
    files = find_files(str(file), key="data.path", default_format="text")
    documents = read_documents(files, document=spec.txt_document, text_column=spec.text_column)
    return [document[spec.text_column] for document in itertools.islice(documents, count)]


@functools.cache
def tokenizer_at(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(folder))


def packed_rows(entry: dict, *, data: Path) -> np.ndarray:
    """The id matrix (rows, length), int32, of one entry of `data.json`."""
    dataset = entry["dataset"]
    make_rows = RowMaker(
        tokenizer=tokenizer_at(data / TOKENIZERS[entry["tokenizer"]]),
        length=entry["length"],
        insert_eos=entry["insert_eos"],
        insert_special=entry["insert_special"],
        detokenize=get_spec(dataset, key="data.valid").detokenize,
    )
    texts = first_documents(data / DOCUMENTS[dataset], dataset=dataset, count=entry["num_docs"])
    starts = range(0, len(texts), DOCUMENTS_PER_BATCH)
    return np.concatenate([make_rows(texts[i : i + DOCUMENTS_PER_BATCH]).ids for i in starts])


def differences(entry: dict, ids: np.ndarray) -> list[str]:
    """The facts of an entry that the id matrix does not have."""
    ends = len(entry["first"])
    found = {
        "rows": len(ids),
        "first": ids.flatten()[:ends].tolist(),
        "last": ids.flatten()[-ends:].tolist(),
        "sha256": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
    }
    return [fact for fact, value in found.items() if value != entry[fact]]


def data_folder(path: Path) -> Path | None:
    """Where documents and tokenizers of a golden file lie; None if they are missing.

    That is `data/` beside the file's folder, as in `../shared`, or in `../shared` itself.
    """
    beside = path.resolve().parent.parent / "data"
    return next((folder for folder in (beside, SHARED_DATA) if folder.is_dir()), None)


def data_rows(path: Path) -> Iterator[Row]:
    """Row counts, ends and hashes of each set and tokenizer under all flag settings."""
    data = data_folder(path)
    entries = json.loads(path.read_text())
    for (dataset, tokenizer), group in itertools.groupby(
        entries, key=lambda entry: (entry["dataset"], entry["tokenizer"])
    ):
        settings = list(group)
        compared = f"{dataset}, {tokenizer}: unequal of {len(settings)}"
        if data is None:
            yield Row(path.name, f"{compared} (no documents here)", None, None)
            continue
        unequal = sum(bool(differences(entry, packed_rows(entry, data=data))) for entry in settings)
        yield Row(path.name, compared, float(unequal), 0.0)
