"""A minute of broken inputs; `python -m tests.faults.fuzz` takes longer and tries more."""

import os
import random
import re
import subprocess
import sys
import time

import pytest

from tests.faults.fuzz import Kind, broken, fuzz
from tests.helpers.places import PROJECT

_ROW = re.compile(r"\| (.+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|")


@pytest.mark.slow
def test_every_broken_input_is_read_or_refused_in_a_line(tmp_path, count):
    """In a process of its own: what a reader in C does to it is a failure too."""
    command = [sys.executable, "-m", "tests.faults.fuzz", "--seconds", "60", "--inputs", "40"]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [_ROW.fullmatch(line) for line in done.stdout.splitlines()]
    counts = {row[1]: [int(number) for number in row.groups()[1:]] for row in rows if row}
    assert len(counts) > 25 and all(tried for tried, *_ in counts.values())
    tried, read, refused, failures = map(sum, zip(*counts.values(), strict=True))
    assert failures == 0 and read > 0 and refused > 0
    count("bytes of an input flipped, inserted, deleted, cut off", tried=tried,
          survived=read + refused)  # fmt: skip


def test_the_same_seed_breaks_the_same_bytes():
    content = bytes(range(256)) * 4
    first, second = ([broken(content, random.Random(7)) for _ in range(5)] for _ in range(2))
    assert first == second and all(changed != content for changed in first)


@pytest.mark.parametrize(
    ("error", "leaves", "outcome"),
    [
        (None, False, "read"),
        (ValueError("file.txt: broken"), False, "refused"),
        (ValueError("something is broken"), False, "names neither file nor key"),
        (ValueError("file.txt: broken"), True, "leaves"),
        (KeyError("state"), False, "KeyError"),
        (BaseException("panic"), False, "BaseException"),
    ],
)
def test_outcomes(error, leaves, outcome, tmp_path):
    def read(source, output):
        if leaves:
            (output / "half").touch()
        if error is not None:
            raise error

    kind = Kind({"file.txt": b"content"}, read)
    (tmp_path / "work").mkdir()
    until = time.monotonic() + 60
    found = fuzz(kind, inputs=1, seed="0", until=until, folder=tmp_path / "work")
    assert found.tried == 1
    if outcome in ("read", "refused"):
        assert getattr(found, outcome) == 1
    else:
        assert outcome in found.failures[0]
        assert (tmp_path / "failure-work-0/file.txt").is_file(), "kept, to be looked at"
