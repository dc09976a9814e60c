"""Reading a data set's documents, from the Hub or from a local copy, and saying what was read."""

import dataclasses
import io
import itertools
import math
import platform
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import fsspec

from corpora import python_docs
from corpora.lines import checked_text
from corpora.local_files import TextFile, files_of_split, find_files, read_documents

Documents = datasets.Dataset | datasets.IterableDataset

# Where each split of text8 starts and ends, in twentieths: 90, 5 and 5 of 100 million characters.
_TEXT8_SPLITS = {"train": (0, 18), "validation": (18, 19), "test": (19, 20)}
_TEXT8_LENGTH = 100_000_000
# text8 has no documents. Pieces this long keep the tokenizer's working memory small, while fewer
# than 1,000 of them make up a split, so that packing drops characters only at the very end.
_TEXT8_PIECE = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub:
    """A place on the Hugging Face Hub.

    Attributes:
        repo: the data set repository.
        config: its configuration (subset), or None for the only one.
        revision: branch, tag or commit; None is the default branch.
        data_files: split -> files, for repositories whose configuration does not say.
    """

    repo: str
    config: str | None = None
    revision: str | None = None
    data_files: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Which documents are wanted, and from where.

    Attributes:
        split: a split in the notation of Hugging Face datasets: `train`, `train[-100000:]`.
        text_column: the column that holds the text.
        document: what one document of a .txt file is (`local_files.read_documents`).
        hub: where to fetch them; not used when there is a path.
        url: where else to fetch them; not used when there is a path.
        path: a local copy, or any fsspec URL.
        path_key: the configuration key that `path` came from, for messages.
        is_path_of_split: the path was given for this split, so no slice is cut from it.
        is_own_text: the user's own files: of a known type, and all of them, whatever their names.
        cache_dir: where downloads are prepared.
        streaming: read while iterating instead of downloading first.
    """

    split: str
    text_column: str
    document: str
    hub: Hub | None = None
    url: str | None = None
    path: str | None = None
    path_key: str = "data.path"
    is_path_of_split: bool = False
    is_own_text: bool = False
    cache_dir: str | None = None
    streaming: bool = False


def describe(request: Request) -> dict[str, Any]:
    """Returns what identifies the documents of a request, for the name of a cache.

    Local files enter with size and modification time, the Hub with its revision.
    """
    identity: dict[str, Any] = {"split": request.split, "text_column": request.text_column}
    if request.path is not None:
        return identity | {
            "files": [(file.url, file.identity) for file in _find(request)],
            "document": request.document,
            "is_path_of_split": request.is_path_of_split,
        }
    if request.hub is not None:
        return identity | {"hub": dataclasses.asdict(request.hub)}
    if request.url is not None:
        return identity | {"url": request.url}
    return identity | {"python": platform.python_version()}


def in_batches(
    documents: Documents, request: Request, size: int, *, first: int = 0
) -> Iterator[list[str]]:
    """Yields the texts in batches of `size`, without the `first` so many batches.

    Raises:
        ValueError: there is no document at all, or one that is no text.
    """
    where, count = f"data.text_column={request.text_column!r}, document", first * size
    if first:
        if isinstance(documents, datasets.Dataset) and first * size >= len(documents):
            return  # `skip` refuses to leave out all there is
        documents = documents.skip(first * size)
    for batch in documents.iter(batch_size=size):
        texts = batch[request.text_column]
        yield [checked_text(text, f"{where} {count + i}") for i, text in enumerate(texts, start=1)]
        count += len(texts)
    if count == 0:
        raise ValueError(
            f"{request.path_key}={request.path!r} holds no document; allowed: at least one, UTF-8"
        )


def num_batches(documents: Documents, size: int) -> int | None:
    """Returns how many batches there are, or None where only reading would tell."""
    return math.ceil(len(documents) / size) if isinstance(documents, datasets.Dataset) else None


def from_hub(request: Request) -> Documents:
    """Reads a set of the Hub, or its local copy.

    Raises:
        FileNotFoundError: the Hub cannot be reached or does not have it.
        ValueError: there is no such column.
    """
    if request.path is not None:
        return from_files(request)
    hub = request.hub
    is_slice = "[" in request.split  # a stream does not know where its last documents begin
    try:
        documents = datasets.load_dataset(
            hub.repo,
            hub.config,
            data_files=dict(hub.data_files) if hub.data_files else None,
            revision=hub.revision,
            split=request.split,
            cache_dir=request.cache_dir,
            streaming=request.streaming and not is_slice,
        )
    except Exception as error:  # the Hub's client has many; all mean that nothing was loaded
        raise FileNotFoundError(_not_fetched(request, error)) from error
    columns = documents.column_names or [request.text_column]
    if request.text_column not in columns:
        raise ValueError(
            f"data.text_column={request.text_column!r} is no column of {hub.repo}; allowed: "
            f"{', '.join(columns)}"
        )
    return documents


def _not_fetched(request: Request, error: Exception) -> str:
    hub = request.hub
    split, _, _ = _parse_split(request.split)
    files = (hub.data_files or {}).get(split, f"the Parquet files of its {split} split")
    subset = f" of the subset {hub.config}" if hub.config else ""
    return (
        f"Could not fetch {files}{subset} from "
        f"https://huggingface.co/datasets/{hub.repo}/tree/{hub.revision or 'main'}. Without a "
        "network, give a local copy in data.path (or data.train_path and data.valid_path); "
        f"another revision: data.revision. Cause: {type(error).__name__}: {error}"
    )


def from_files(request: Request) -> Documents:
    """Reads files as a stream of documents; errors come while reading."""
    arguments = {"document": request.document, "text_column": request.text_column}
    files = _find(request)
    _, start, stop = _parse_split(request.split)
    if request.is_path_of_split or (start, stop) == (None, None):
        # a list: the stream can be shared out by file
        return datasets.IterableDataset.from_generator(
            read_documents, gen_kwargs={"files": files, **arguments}
        )
    total = sum(1 for _ in read_documents(files, **arguments))
    begin, end, _ = slice(start, stop).indices(total)
    if total <= max(abs(start or 0), abs(stop or 0)):
        raise ValueError(
            f"{request.path_key}={request.path!r} holds {total} documents, too few to cut "
            f"{request.split} from them; give data.train_path and data.valid_path instead"
        )
    return datasets.IterableDataset.from_generator(
        _documents_between,
        gen_kwargs={"files": tuple(files), "begin": begin, "end": end, **arguments},
    )


def _documents_between(
    files: tuple[TextFile, ...], begin: int, end: int, document: str, text_column: str
) -> Iterator[dict[str, str]]:
    yield from itertools.islice(read_documents(files, document, text_column), begin, end)


def _find(request: Request) -> list[TextFile]:
    """Returns the files of the request's split."""
    if request.is_own_text:
        return find_files(request.path, key=request.path_key)
    # The sets' own archives have names such as news.en-00001-of-00100.
    files = find_files(request.path, key=request.path_key, default_format="text")
    split, _, _ = _parse_split(request.split)
    return files_of_split(files, split, key=f"{request.path_key}={request.path!r}")


def _parse_split(split: str) -> tuple[str, int | None, int | None]:
    """Returns (name, start, stop) of `name[start:stop]`; the bounds are None where absent."""
    name, start, stop = re.fullmatch(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?", split).groups()
    return name, start and int(start), stop and int(stop)


def from_text8(request: Request) -> Documents:
    """Reads text8, zipped or not, and cuts its split: 90, 5 and 5 million characters.

    A shorter file, such as a prefix for tests, is cut 90 : 5 : 5.

    Raises:
        FileNotFoundError: it cannot be fetched.
        ValueError: there are characters other than a to z and the space.
    """
    urls = [request.url] if request.path is None else [file.url for file in _find(request)]
    text = "".join(_read_text8(url) for url in urls)
    if not request.is_path_of_split:
        start, end = _TEXT8_SPLITS[request.split]
        length = min(len(text), _TEXT8_LENGTH)
        text = text[length * start // 20 : length * end // 20]
    pieces = [text[i : i + _TEXT8_PIECE] for i in range(0, len(text), _TEXT8_PIECE)]
    return datasets.Dataset.from_dict({request.text_column: pieces})


def _read_text8(url: str) -> str:
    try:
        with fsspec.open(url, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise FileNotFoundError(
            f"Could not fetch text8 from {url}. Without a network, give a local copy, zipped or "
            f"not, in data.path. Cause: {type(error).__name__}: {error}"
        ) from error
    if zipfile.is_zipfile(io.BytesIO(data)):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read(archive.namelist()[0])
        except Exception as error:  # a damaged archive fails in every possible way
            raise ValueError(f"{url} is no readable zip archive: {error!r}") from error
    data = data.removesuffix(b"\n")
    if other := re.search(rb"[^a-z ]", data):
        raise ValueError(
            f"{url} is not text8: byte {other.start() + 1} is {other[0]!r}; allowed: the letters "
            "a to z and the space"
        )
    return data.decode("ascii")


def from_python(request: Request) -> Documents:
    """Reads the reference text that ships with this Python."""
    return datasets.Dataset.from_dict({request.text_column: python_docs.documents(request.split)})
