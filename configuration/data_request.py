"""The section `data` read: which documents each role, `train` or `valid`, is made of.

Whatever leaves open where they are is refused here, before anything is read.
"""

import dataclasses
import os

from omegaconf import DictConfig

from corpora import sources
from corpora.local_files import DOCUMENT_MODES
from corpora.registry import DatasetSpec, get_spec
from corpora.sources import Request
from utils import absolute_path


def request_of(config: DictConfig, role: str) -> tuple[DatasetSpec, Request]:
    """Returns the entry of a role's data set and what to read of it."""
    data = config.data
    spec = get_spec(data[role], key=f"data.{role}")
    _check_place(config, role, spec)
    own_path = data[f"{role}_path"]
    path = own_path or data.path
    hub = spec.hub
    if hub is not None and data.revision is not None:
        hub = dataclasses.replace(hub, revision=data.revision)
    return spec, Request(
        split=spec.split(role),
        text_column=data.text_column or spec.text_column,
        document=spec.txt_document or data.document,
        hub=hub,
        url=spec.url,
        path=None if path is None else absolute_path(path),
        path_key="data.path" if own_path is None else f"data.{role}_path",
        is_path_of_split=own_path is not None,
        is_own_text=spec.txt_document is None,
        cache_dir=os.path.join(absolute_path(data.cache_dir), "hub"),
        streaming=data.streaming and role == "train",
    )


def _check_place(config: DictConfig, role: str, spec: DatasetSpec) -> None:
    """Rejects keys that do not say clearly where the documents of a role are."""
    data = config.data
    path = data[f"{role}_path"] or data.path
    other_role = "valid" if role == "train" else "train"
    other = get_spec(data[other_role], key=f"data.{other_role}")
    is_shared = (spec.load, spec.hub) == (other.load, other.hub)
    unclear = {"path": path == data.path, "revision": spec.hub is not None}
    for key, is_used in unclear.items():
        if data[key] is not None and is_used and not is_shared:
            raise ValueError(
                f"data.{key}={data[key]!r} does not say which set it belongs to, since data.train="
                f"{data.train!r} and data.valid={data.valid!r} differ; allowed: null, with "
                "data.train_path and data.valid_path for local copies"
            )
    takes_path = spec.hub or spec.url or spec.txt_document is None
    if path is not None and not takes_path:
        raise ValueError(
            f"data.path={path!r}: the text of data.{role}={data[role]} comes with Python; allowed: "
            "null, or data=local for text of your own"
        )
    if path is None and spec.txt_document is None:
        raise ValueError(
            f"data.{role}_path=null: data={data[role]} needs the path of your text; allowed: a "
            "file, a directory or a glob of .txt, .jsonl or .parquet, local or any fsspec URL"
        )
    if data.document not in DOCUMENT_MODES:
        raise ValueError(
            f"data.document={data.document!r} is unknown; allowed: {', '.join(DOCUMENT_MODES)}"
        )


def check_different_files(config: DictConfig) -> None:
    """Rejects one local file that would silently serve as both training and validation set."""
    spec, train = request_of(config, "train")
    _, valid = request_of(config, "valid")
    if (train.path_key, valid.path_key) != ("data.path", "data.path") or train.path is None:
        return
    # Without documents (text8), and with a slice (OpenWebText), one file is cut in two.
    is_cut = not spec.has_documents or "[" in train.split + valid.split
    if train.split == valid.split or is_cut:
        return
    if sources.describe(train)["files"] == sources.describe(valid)["files"]:
        raise ValueError(
            f"data.path={config.data.path!r} would be the training and the validation set at "
            "once; allowed: a directory with files named train... and valid..., or one path each "
            "in data.train_path and data.valid_path"
        )
