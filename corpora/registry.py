"""The data sets: what each is called, where it lives, and how its text is treated.

The Hugging Face locations are those that load without running anyone's loading script
(datasets >= 4 refuses scripts): plain Parquet repositories, or the Hub's own Parquet export of
an old script repository (`refs/convert/parquet`). Every set can be read from a local copy
instead, and at another revision.
"""

import dataclasses
import functools
from collections.abc import Callable

from corpora import detokenizers, sources
from corpora.detokenizers import Detokenizer
from corpora.local_files import RAW_LINE
from corpora.sources import Documents, Hub, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set.

    Attributes:
        load: reads the documents of a request; other columns than the text's may be present.
        hub: where it lives on the Hub, if it does.
        url: where else it lives.
        text_column: the column that holds the text.
        txt_document: what one document of a local .txt copy is; None: the user's own text, where
            the user says.
        detokenize: undoes the published form's word splitting.
        validation_split: the split that validation reads.
        is_single_split: the entry is one list of documents, `validation_split`, in either role.
        crops_train: training rows are twice the model's length, and a random window is cut.
        has_documents: False for one running text, which then gets no EOS between its pieces and
            no BOS ... EOS around its rows unless asked for.
    """

    load: Callable[[Request], Documents]
    hub: Hub | None = None
    url: str | None = None
    text_column: str = "text"
    txt_document: str | None = "line"
    detokenize: Detokenizer | None = None
    validation_split: str = "validation"
    is_single_split: bool = False
    crops_train: bool = False
    has_documents: bool = True

    def split(self, role: str) -> str:
        """Returns the split that a role, `train` or `valid`, reads."""
        return "train" if role == "train" and not self.is_single_split else self.validation_split


def get_spec(name: str, *, key: str) -> DatasetSpec:
    """Returns the entry of a data set; an unknown name is a ValueError that lists the known."""
    if name not in DATASETS:
        raise ValueError(f"{key}={name!r} is unknown; allowed: {', '.join(DATASETS)}")
    return DATASETS[name]


def _parquet_export(repo: str, directory: str) -> Hub:
    # The export of a large set is cut short, and its directories are called partial-train etc.
    splits = ("train", "validation", "test")
    return Hub(
        repo=repo,
        revision="refs/convert/parquet",
        data_files={split: f"{directory}/*{split}/*.parquet" for split in splits},
    )


_wikitext = functools.partial(
    DatasetSpec,
    load=sources.from_hub,
    txt_document=RAW_LINE,
    detokenize=detokenizers.wikitext,
)
_openwebtext = functools.partial(
    DatasetSpec,
    load=sources.from_hub,
    hub=Hub(repo="Skylion007/openwebtext"),
    txt_document="file",
)
_scientific_papers = functools.partial(
    DatasetSpec,
    load=sources.from_hub,
    text_column="article",
    txt_document="file",
    detokenize=detokenizers.scientific_papers,
)
_text8 = functools.partial(
    DatasetSpec,
    load=sources.from_text8,
    url="http://mattmahoney.net/dc/text8.zip",
    validation_split="test",
    has_documents=False,
)

DATASETS: dict[str, DatasetSpec] = {
    "ag_news": DatasetSpec(
        load=sources.from_hub, hub=Hub(repo="fancyzhx/ag_news"), validation_split="test"
    ),
    "lambada": DatasetSpec(
        load=sources.from_hub,
        hub=Hub(repo="EleutherAI/lambada_openai", config="default"),
        txt_document="file",
        detokenize=detokenizers.lambada,
        validation_split="test",
        is_single_split=True,
    ),
    "lm1b": DatasetSpec(
        load=sources.from_hub,
        hub=Hub(repo="FrankCCCCC/lm1b"),
        detokenize=detokenizers.lm1b,
        validation_split="test",
    ),
    "local": DatasetSpec(load=sources.from_files, txt_document=None),
    # OpenWebText has no validation split: its last 100,000 documents are it.
    "openwebtext": _openwebtext(validation_split="train[-100000:]"),
    "openwebtext-train": _openwebtext(validation_split="train[:-100000]", is_single_split=True),
    "openwebtext-valid": _openwebtext(validation_split="train[-100000:]", is_single_split=True),
    "ptb": DatasetSpec(
        load=sources.from_hub,
        hub=_parquet_export("ptb-text-only/ptb_text_only", "penn_treebank"),
        text_column="sentence",
        detokenize=detokenizers.ptb,
    ),
    "python_docs": DatasetSpec(load=sources.from_python),
    "scientific_papers_arxiv": _scientific_papers(
        hub=_parquet_export("armanc/scientific_papers", "arxiv")
    ),
    "scientific_papers_pubmed": _scientific_papers(
        hub=_parquet_export("armanc/scientific_papers", "pubmed")
    ),
    "text8": _text8(),
    "text8-crop": _text8(crops_train=True),
    "wikitext103": _wikitext(hub=Hub(repo="Salesforce/wikitext", config="wikitext-103-raw-v1")),
    "wikitext2": _wikitext(hub=Hub(repo="Salesforce/wikitext", config="wikitext-2-raw-v1")),
}
