"""What the sections `data` and `loader` ask for: documents, rows and batches.

Whatever leaves open where the documents are is refused here, before anything is read.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

from omegaconf import DictConfig

from corpora import sources
from corpora.local_files import DOCUMENT_MODES
from corpora.registry import DatasetSpec, get_spec
from corpora.sources import Request
from utils import absolute_path

Role = Literal["train", "valid"]


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """The sections `data` and `loader`, and what else rows depend on; fields are named as keys.

    Attributes:
        train, valid: names of the data sets.
        tokenizer_name_or_path: see `corpora.tokenization`.
        length: tokens of a row (`model.length`).
        seed: of the order of the training rows.
        repeats_epoch: training has the same rows in every epoch (`trainer.overfit_batches`).
        wrap: pack documents into rows; otherwise each is padded to a row of its own.
        insert_train_eos, insert_train_special, insert_valid_eos, insert_valid_special: None as
            the data set's entry says.
        streaming, shuffle_buffer: make training rows while training.
        path, train_path, valid_path, revision, text_column, document: where documents are.
        cache_dir: absolute, or a URL.
        num_proc: processes that tokenize.
        batch_size: rows of a training batch of one device, or "auto".
        eval_batch_size, global_batch_size, num_workers, pin_memory: of `loader`.
    """

    train: str
    valid: str
    tokenizer_name_or_path: str
    length: int
    seed: int
    repeats_epoch: bool
    wrap: bool
    insert_train_eos: bool | None
    insert_train_special: bool | None
    insert_valid_eos: bool | None
    insert_valid_special: bool | None
    streaming: bool
    shuffle_buffer: int
    path: str | None
    train_path: str | None
    valid_path: str | None
    revision: str | None
    text_column: str | None
    document: str
    cache_dir: str
    num_proc: int
    batch_size: int | str
    eval_batch_size: int
    global_batch_size: int
    num_workers: int
    pin_memory: bool

    def name(self, role: Role) -> str:
        """Of a role's data set."""
        return getattr(self, role)

    def spec(self, role: Role) -> DatasetSpec:
        """The entry of a role's data set.

        Raises:
            ValueError: there is none.
        """
        return get_spec(self.name(role), key=f"data.{role}")

    def insert_eos(self, role: Role) -> bool:
        """Whether EOS follows each document; running text has none by default."""
        flag = getattr(self, f"insert_{role}_eos")
        return self.spec(role).has_documents if flag is None else flag

    def insert_special(self, role: Role) -> bool:
        """Whether rows are wrapped in BOS and EOS; those of running text are not by default."""
        flag = getattr(self, f"insert_{role}_special")
        return self.spec(role).has_documents if flag is None else flag

    def documents(self, role: Role) -> Request:
        """What to read of a role's data set.

        Raises:
            ValueError: the keys do not say clearly where its documents are.
        """
        spec, own_path = self.spec(role), self._own_path(role)
        self._check_place(role)
        path = own_path or self.path
        hub = spec.hub
        if hub is not None and self.revision is not None:
            hub = dataclasses.replace(hub, revision=self.revision)
        return Request(
            split=spec.split(role),
            text_column=self.text_column or spec.text_column,
            document=spec.txt_document or self.document,
            hub=hub,
            url=spec.url,
            path=None if path is None else absolute_path(path),
            path_key="data.path" if own_path is None else f"data.{role}_path",
            is_path_of_split=own_path is not None,
            is_own_text=spec.txt_document is None,
            cache_dir=os.path.join(self.cache_dir, "hub"),
            streaming=self.streaming and role == "train",
        )

    def _own_path(self, role: Role) -> str | None:
        return getattr(self, f"{role}_path")

    def _check_place(self, role: Role) -> None:
        spec, path = self.spec(role), self._own_path(role) or self.path
        other = self.spec("valid" if role == "train" else "train")
        is_shared = (spec.load, spec.hub) == (other.load, other.hub)
        unclear = {"path": path == self.path, "revision": spec.hub is not None}
        for key, is_used in unclear.items():
            value = getattr(self, key)
            if value is not None and is_used and not is_shared:
                raise ValueError(
                    f"data.{key}={value!r} does not say which set it belongs to, since data.train="
                    f"{self.train!r} and data.valid={self.valid!r} differ; allowed: null, with "
                    "data.train_path and data.valid_path for local copies"
                )
        takes_path = spec.hub or spec.url or spec.txt_document is None
        if path is not None and not takes_path:
            raise ValueError(
                f"data.path={path!r}: the text of data.{role}={self.name(role)} comes with Python; "
                "allowed: null, or data=local for text of your own"
            )
        if path is None and spec.txt_document is None:
            raise ValueError(
                f"data.{role}_path=null: data={self.name(role)} needs the path of your text; "
                "allowed: a file, a directory or a glob of .txt, .jsonl or .parquet, local or any "
                "fsspec URL"
            )
        if self.document not in DOCUMENT_MODES:
            raise ValueError(
                f"data.document={self.document!r} is unknown; allowed: {', '.join(DOCUMENT_MODES)}"
            )

    def check_different_files(self) -> None:
        """Rejects one local file that would silently serve as both training and validation set."""
        spec, train, valid = self.spec("train"), self.documents("train"), self.documents("valid")
        if (train.path_key, valid.path_key) != ("data.path", "data.path") or train.path is None:
            return
        # Without documents (text8), and with a slice (OpenWebText), one file is cut in two.
        is_cut = not spec.has_documents or "[" in train.split + valid.split
        if train.split == valid.split or is_cut:
            return
        if sources.describe(train)["files"] == sources.describe(valid)["files"]:
            raise ValueError(
                f"data.path={self.path!r} would be the training and the validation set at once; "
                "allowed: a directory with files named train... and valid..., or one path each in "
                "data.train_path and data.valid_path"
            )


def data_request(config: DictConfig) -> DataRequest:
    """The request of a composed configuration."""
    elsewhere = {
        "length": config.model.length,
        "seed": config.seed,
        "repeats_epoch": bool(config.trainer.get("overfit_batches")),
        "cache_dir": absolute_path(config.data.cache_dir),
    }
    names = [field.name for field in dataclasses.fields(DataRequest) if field.name not in elsewhere]
    # openwebtext-split.yaml alone has these keys; with other sets users add them (`+`).
    flags = {name: None for name in names if name.startswith("insert_")}
    given = {
        name: section[name]
        for section in (config.data, config.loader)
        for name in names
        if name in section.keys()  # `in section` would resolve the value
    }
    return DataRequest(**flags | given | elsewhere)
