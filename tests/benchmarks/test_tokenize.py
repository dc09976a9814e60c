"""The benchmark of preparing rows makes what it says."""

import json
from pathlib import Path

import pytest

from benchmarks import tokenize


@pytest.mark.parametrize("characters", [40, 100, 20_000])
def test_documents_are_of_the_size(tmp_path: Path, capsys, characters: int):
    (tmp_path / "text").write_text("A text of a few words, again and again. " * 2)
    tokenize.main(
        ["--tokenizer", "bytes", "--text", f"{tmp_path}/text", "--megabytes", "0.02",
         "--characters", str(characters)]
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 20_000 and result["peak_mb"] > 0 and result["num_proc"] == 1
