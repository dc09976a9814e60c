"""Broken inputs of every kind at every reader: `python -m tests.faults.fuzz --seconds 600`.

Bytes of a whole file are flipped, inserted, deleted, repeated or cut off, and whoever reads it in
a run reads it. That ends in success, or in an error of `main.USER_ERRORS`, which a user sees as one
line; with what is written there whole or not at all. All else is a failure: another exception, a
process that hangs, a half-written output.
"""

import argparse
import contextlib
import faulthandler
import io
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import main

# Seconds after which a reader hangs.
PATIENCE = 60
# What stands in files and is read as something else.
_TOKENS = (
    b"-1", b"0", b"1e999", b"99999999999999999999", b"NaN", b"null", b"[]", b"{}", b'""',
    b"\\ud800", b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"\n", b"\r", b"\xe2\x80\xa8", b"[MASK]",
    b"[MASK:0]", b'"', b",", b"true",
)  # fmt: skip


class Hang(BaseException):
    """A reader took longer than `PATIENCE`."""


@dataclass
class Kind:
    """One kind of input.

    Attributes:
        files: whole files by name, of which one is broken at a time.
        read: what reads them, given the folder they lie in and one for outputs.
        names: what else an error may name than the broken file.
        draw: makes the content of the broken file instead; its part before `=` may be named.
    """

    files: dict[str, bytes]
    read: Callable[[Path, Path], None]
    names: Sequence[str] = ()
    draw: Callable[[random.Random], bytes] | None = None


@dataclass
class Outcomes:
    """What became of the inputs of one kind."""

    read: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.read + self.refused + len(self.failures)


def broken(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three things wrong."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, length = _place(len(data), draw), draw.choice((1, 1, 2, 8, 64))
        match draw.randrange(8):
            case 0 if data:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + length] = draw.randbytes(length)
            case 2:
                data[at:at] = draw.randbytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                del data[at:]
            case _:
                token = draw.choice(_TOKENS)
                data[at : at + draw.choice((0, 1, len(token)))] = token
    return bytes(data)


def _place(size: int, draw: random.Random) -> int:
    """A place in a file, where large ones have their structure more often: beginning and end."""
    if size < 2:
        return 0
    near = min(size, 4_000)
    anywhere, from_end = draw.randrange(size), draw.randrange(near)
    return draw.choice((anywhere, draw.randrange(near), size - 1 - from_end))


def fuzz(kind: Kind, *, inputs: int, seed: str, until: float, folder: Path) -> Outcomes:
    """Read so many broken inputs; the same seed gives the same ones.

    Args:
        kind: of input.
        inputs: how many at most.
        seed: of the damages.
        until: moment of `time.monotonic` at which to stop.
        folder: an empty one, to work in.
    """
    found, draw = Outcomes(), random.Random(seed)
    for number in range(inputs):
        if time.monotonic() > until:
            break
        name = draw.choice(sorted(kind.files))
        content = kind.draw(draw) if kind.draw else broken(kind.files[name], draw)
        source, output = folder / f"{number}", folder / f"{number}-out"
        for each, whole in kind.files.items():
            path = source / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if each == name else whole)
        output.mkdir()
        names = (name.split("/")[0], str(source), *kind.names)
        if kind.draw:
            key = content.partition(b"=")[0].decode()
            names += (key, key.rpartition(".")[0] or key, key.rpartition(".")[2])
        problem = _problem(kind, source, output, names=names)
        if problem is None:
            found.read += 1
        elif problem == "":
            found.refused += 1
        else:
            kept = folder.parent / f"failure-{folder.name}-{number}"
            shutil.copytree(source, kept)
            what = content.decode() if kind.draw else f"{name} broken"
            found.failures.append(f"{kept}, {what}: {problem}")
        shutil.rmtree(source)
        shutil.rmtree(output)
    return found


def _problem(kind: Kind, source: Path, output: Path, *, names: Sequence[str]) -> str | None:
    """None: it was read; "": an error said so in a line; else what is wrong."""
    try:
        with _limited(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(
            io.StringIO()
        ):
            kind.read(source, output)
        return None
    except main.USER_ERRORS as error:
        said = main.explained(error)
        if not any(name in said for name in names):
            return f"names neither file nor key: {said}"
        left = sorted(path.name for path in output.rglob("*") if path.is_file())
        return f"leaves {left} behind: {said}" if left else ""
    except Hang:
        return f"hangs\n{traceback.format_exc()[-1500:]}"
    except BaseException as error:  # those of Rust are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}\n{traceback.format_exc()[-2500:]}"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def give_up(signum: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)  # where Python never gets to run
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_whole(kind: Kind, folder: Path) -> None:
    """The whole files are read, or all that follows says nothing."""
    for name, content in kind.files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "out").mkdir()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        kind.read(folder / "in", folder / "out")


def main_command() -> int:
    """The command line; prints a row of the table for each kind."""
    from tests.faults.fuzzed_inputs import kinds

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--inputs", type=int, default=10**9, help="of each kind, at most")
    parser.add_argument("--kind", help="only kinds whose name holds this")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    faulthandler.enable()  # a reader in C may end the process; its input then lies in the folder
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    chosen = {k: v for k, v in kinds(folder / "kinds").items() if (options.kind or "") in k}
    failures = Counter()
    print("| input | tried | read | refused in one line | failures |\n|---|---|---|---|---|")
    for number, (name, kind) in enumerate(chosen.items()):
        place = folder / str(number)
        place.mkdir()
        until = time.monotonic() + options.seconds / len(chosen)
        found = fuzz(kind, inputs=options.inputs, seed=f"{options.seed} {name}",
                     until=until, folder=place)  # fmt: skip
        counts = (found.tried, found.read, found.refused, len(found.failures))
        print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)
        for failure in found.failures:  # each kind of them once
            failures[failure.splitlines()[-1][:60]] += 1
            if failures[failure.splitlines()[-1][:60]] == 1:
                print(failure, file=sys.stderr, flush=True)
    shutil.rmtree(folder / "kinds")
    if not failures:
        shutil.rmtree(folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main_command())
