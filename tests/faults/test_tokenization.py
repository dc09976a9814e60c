"""Preparing rows is killed: what has been committed is kept, and the result is the same."""

import json
import random
import re

import pytest

from tests.helpers.killable_runs import Run
from tests.helpers.small_run import sentences

BATCHES = 30


@pytest.mark.slow
def test_kills_while_rows_are_prepared(tmp_path, count, repeats):
    """SIGKILL at random moments, with one process and with three, which do not outlive it."""
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        lines = sentences() * (BATCHES * 1_000 // len(sentences()))
        (folder / "train.txt").write_text("".join(lines))
        (folder / "valid.txt").write_text("".join(sentences()[::12]))
    changes = ["algo=ar", "trainer.max_steps=1", "data.num_proc=1"]
    straight, killed = (Run(tmp_path / name, *changes) for name in ("straight", "killed"))
    straight.run()
    draw, kept = random.Random(8), []
    num_kills = repeats(5, in_suite=2)
    for num_proc in (1, 3, 1, 1, 3)[:num_kills]:
        output = killed.run(f"data.num_proc={num_proc}", expected=-9, preparation=f"""
from corpora import packing, row_cache
row_cache._COMMIT_EVERY = 0.1
packing._CHARACTERS_WORTH_A_POOL = 100_000
before(packing.RowMaker, "__call__", lambda *_: time.sleep(0.1))
append, first = row_cache._Builder.append, True
def strike(self, batch):
    global first
    if first and self._key["dataset"] == "local":
        first = False
        threading.Timer({draw.uniform(0.2, 1.5)}, os.kill, (os.getpid(), signal.SIGKILL)).start()
before(row_cache._Builder, "append", strike)
""")  # fmt: skip
        kept.append(rows_kept(output))
    output = killed.run()
    kept.append(rows_kept(output))
    entries = [next((tmp_path / name / "cache/rows").glob("local_train-*/"))
               for name in ("straight", "killed")]  # fmt: skip
    for name in ("ids.uint16", "lengths.int32"):
        assert (entries[0] / name).read_bytes() == (entries[1] / name).read_bytes()
    metas = [json.loads((entry / "meta.json").read_text()) for entry in entries]
    assert metas[0]["sha256"] == metas[1]["sha256"] and metas[0]["rows"] == metas[1]["rows"]
    print(f"kept at each start: {kept} of {metas[0]['rows']:,} rows")
    assert kept == sorted(kept) and kept[1] > 0 and len(set(kept)) > (num_kills + 1) // 2
    count("SIGKILL while rows are prepared", tried=num_kills, survived=num_kills)


def rows_kept(output: str) -> int:
    """What a start says that it has found."""
    found = re.search(r"local train: going on after .*?: ([\d,]+) rows are kept", output)
    return int(found[1].replace(",", "")) if found else 0
