"""Everything that only a GPU can tell, part after part: `benchmarks/gpu.sh` starts this.

    python -m benchmarks.gpu [PART ...]

A part is a few commands, which share its time limit. What each prints goes to the terminal and to
a log; then one line of its figures is read from what it has written. A command that fails or takes
too long is named in the summary, and the others are carried out all the same.
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.machine import description
from utils import json_text

PROJECT = Path(__file__).resolve().parents[1]
BUDGET = 480  # seconds of all parts together
KILL_AFTER = 10  # seconds that a command has to end by itself at its limit
# What compilers say when they give up on a function, and what ours say when they do without.
GAVE_UP = re.compile(
    r"(recompile|cache_size)_?limit|RecompileLimit|fall(s|ing)?[ -]?back"
    r"|shapes, which is the limit|no further ones will be|No C compiler",
    flags=re.IGNORECASE,
)
ENVIRONMENT = {"PYTHONUNBUFFERED": "1"}
# A rehearsal tries command lines, not compilers, which take minutes on a CPU.
ENVIRONMENT_OF_REHEARSAL = {"TORCHDYNAMO_DISABLE": "1"}
SMALLEST = ("model.hidden_size=32", "model.n_heads=2", "model.n_blocks=2", "model.cond_dim=16")
Words = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the commands run.

    Attributes:
        device: cuda or cpu.
        is_tiny: a rehearsal: every command, at a size that any machine can do in seconds.
        results: the folder of the results.
        scratch: a folder for what is not kept, such as checkpoints.
    """

    device: str
    is_tiny: bool
    results: Path
    scratch: Path

    def json(self, name: str) -> str:
        return str(self.results / f"{name}.json")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process of a part.

    Attributes:
        name: of its log and its JSON.
        words: behind the interpreter.
        figures: reads its line of figures from the folders and its log; raises `Unexpected` where
            they are not what they should be.
        environment: variables.
        missing: why it cannot run here.
    """

    name: str
    words: Words
    figures: Callable[[Place, str], str] = lambda *_: ""
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


@dataclass(kw_only=True)
class Outcome:
    """What became of a command."""

    part: str
    name: str
    state: str  # ok | failed: why | out of time | left out: why
    seconds: float = 0.0
    figures: str = ""


class Unexpected(RuntimeError):
    """A command ended well, and its results are not what they should be."""


# --- the parts -------------------------------------------------------------------------------


def quickstart(place: Place) -> list[Command]:
    """A whole run: training with search, evaluation and samples, compiled; nothing recompiled."""
    words = [
        *_training(place, "quickstart"),
        "training.compile=true", "loader.num_workers=2",
        f"loader.pin_memory={place.device != 'cpu'}",
        "algo.fix_clipping=false", "algo.var_min=true", "then=[ppl_eval,sample_eval]",
        "trainer.max_steps=60", "trainer.log_every_n_steps=5", "trainer.val_check_interval=30",
        "trainer.limit_val_batches=4", "lr_scheduler.warmup_t=10",
    ]  # fmt: skip
    return [
        Command(name="quickstart", words=tuple(words), figures=training_figures,
                environment={"TORCH_LOGS": "recompiles"})
    ]  # fmt: skip


def train_step(place: Place) -> list[Command]:
    """The training step at two batch sizes, and what it does on the device."""
    return [
        _step(place, f"train_step_b{size}", "--batch-size", size, "--profile", "3")
        for size in ("16", "32")
    ]


def head(place: Place) -> list[Command]:
    """The head's variants side by side."""
    words = ["-m", "benchmarks.head", "--device", place.device, "--json", place.json("head")]
    missing = None if find_spec("benchmarks.head") else "no benchmarks/head.py"
    words += ["--seconds", "0.1"] * place.is_tiny
    return [Command(name="head", words=tuple(words), missing=missing, figures=variants)]


def sampling(place: Place) -> list[Command]:
    """Sampling with the KV cache, as it is written, as CUDA graphs and compiled."""
    sizes = ("--model", "tiny", "--block-size", "4") if place.is_tiny else ()
    modes = ("--compile", "false", "graphs", "true")
    shared = ("-m", "benchmarks.sampling", "--device", place.device, *sizes, *modes)
    precision = ("--precision", "float32", "--length", "8") if place.is_tiny else ()
    batches = ("--batch-size", "1", "2" if place.is_tiny else "64")
    return [
        Command(name="sampling", figures=sampling_figures,
                words=(*shared, *batches, *precision, "--json", place.json("sampling"))),
        # Two seeds, in float32: in bf16 other kernels round otherwise, and texts go other ways.
        Command(name="same_texts", figures=same_texts,
                words=(*shared, "--batch-size", "2", "--precision", "float32", "--texts",
                       "--length", "8" if place.is_tiny else "128",
                       "--json", place.json("same_texts"))),
    ]  # fmt: skip


def tests(place: Place) -> list[Command]:
    """The tests that need a GPU."""
    words = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-rf", "-p", "no:cacheprovider"]
    if find_spec("xdist"):
        words += ["-n", "2" if place.is_tiny else "8"]
    return [Command(name="tests", words=tuple(words), figures=last_line)]


def reference(place: Place) -> list[Command]:
    """What the original does, and ours on SDPA, in the memory that the reference leaves."""
    return [
        _step(place, "reference", "--batch-size", "16", "--against", "reference", backend="sdpa")
    ]


def rest(place: Place) -> list[Command]:
    """Other block sizes and algorithms, evaluation, attention alone, and samples to look at."""
    steps = ("--batch-size", "16")
    evaluation = _options(place, "16", "--algo", "bd3lm", "--against", "reference")
    minute = [
        *_training(place, "minute"), "then=[sample_eval]",
        "trainer.max_steps=30" if place.is_tiny else "trainer.max_time=00:00:01:00",
    ]  # fmt: skip
    minute += [] if place.is_tiny else ["trainer.max_steps=100000", "sampling.num_sample_batches=1"]
    return [
        _step(place, "train_step_l4", *steps, block_size="4"),
        Command(name="attention", figures=variants,
                words=("-m", "benchmarks.attention", "--device", place.device,
                       "--json", place.json("attention"), *["--tiny"] * place.is_tiny)),
        _step(place, "mdlm", *steps, "--algo", "mdlm"),
        Command(name="eval", figures=step_figures,
                words=("-m", "benchmarks.eval", *evaluation, "--json", place.json("eval"))),
        Command(name="search", figures=step_figures,
                words=("-m", "benchmarks.eval", *evaluation, "--search",
                       "--json", place.json("search"))),
        _step(place, "ar", *steps, "--algo", "ar"),
        _step(place, "sedd", *steps, "--algo", "sedd"),
        Command(name="minute", words=tuple(minute), figures=training_figures),
    ]  # fmt: skip


# Seconds of each part; the last has what the others leave.
PARTS: dict[str, tuple[Callable[[Place], list[Command]], int]] = {
    "quickstart": (quickstart, 60),
    "train_step": (train_step, 90),
    "head": (head, 40),
    "sampling": (sampling, 100),
    "tests": (tests, 120),
    "reference": (reference, 60),
    "rest": (rest, BUDGET),
}


def _training(place: Place, name: str) -> list[str]:
    """A run of main.py whose directory is not kept."""
    folder = place.scratch / name
    words = ["main.py", "experiment=quickstart", "wandb=null", "logger=csv",
             f"hydra.run.dir={folder}", f"checkpointing.save_dir={folder}"]  # fmt: skip
    if place.is_tiny:
        words += ["model.hidden_size=64", "model.n_heads=2", "model.n_blocks=2", "model.length=16",
                  "trainer.accelerator=cpu", "sampling.min_entropy=null"]  # fmt: skip
    return words


def _options(place: Place, batch_size: str, *more: str, block_size: str = "16") -> Words:
    """Of a benchmark of whole steps."""
    sizes = ("--model", "small", "--length", "1024", "--block-size", block_size,
             "--batch-size", batch_size, "--precision", "bf16", "--compile", "true")  # fmt: skip
    if place.is_tiny:
        sizes = ("--model", "tiny", "--length", "16", "--block-size", block_size,
                 "--batch-size", "2", "--precision", "float32", "--compile", "false",
                 "--warmup", "1", "--steps", "1", "--rounds", "1",
                 "--peak-size", "256", "--overrides", *SMALLEST)  # fmt: skip
    return ("--device", place.device, *sizes, *more)


def _step(
    place: Place, name: str, *words: str, block_size: str = "16", backend: str = "auto"
) -> Command:
    """A benchmark of a training step; `words` begin with its batch size."""
    batch_size, more = words[1], words[2:]
    options = list(_options(place, batch_size, *more, block_size=block_size))
    if "--algo" in more:  # without blocks
        at = options.index("--block-size")
        del options[at : at + 2]
    options += ["--attn-backend", backend, "--json", place.json(name)]
    return Command(name=name, words=("-m", "benchmarks.train_step", *options), figures=step_figures)


# --- their figures ---------------------------------------------------------------------------


def read_json(place: Place, name: str) -> dict:
    """What a command wrote."""
    path = place.results / f"{name}.json"
    if not path.is_file():
        raise Unexpected(f"wrote no {path.name}")
    return json.loads(path.read_text())


def step_figures(place: Place, name: str) -> str:
    """Time, tokens, share of the peak and memory of each row, and what a profile counted."""
    lines = []
    for row in read_json(place, name)["rows"]:
        text = (
            f"{row['name']}: {row['seconds'] * 1e3:,.0f} ms, {row['tokens_per_second']:,.0f} "
            f"tokens/s, {row['share_of_peak']:.0%} of peak, {row['memory_mb']:,.0f} MB"
        )
        if row["times_reference"] is not None and row["job"]["side"] == "ours":
            text += f", {row['times_reference']:.2f} x reference"
        profile = row["result"]["profile"]
        if profile is not None:
            waits = sum(profile["waits"].values())
            text += f", {profile['launches']:,.0f} launches and {waits:g} waits per step"
        lines.append(text)
    return "; ".join(lines)


def training_figures(place: Place, name: str) -> str:
    """How far the loss fell; keeps a run's numbers and samples.

    Raises:
        Unexpected: it did not fall, or the compiler gave up on a function.
    """
    folder = place.scratch / name
    for found in (*folder.rglob("metrics.csv"), *folder.rglob("samples.csv"),
                  folder / "ppl_eval.json"):  # fmt: skip
        if found.is_file():
            shutil.copy(found, place.results / f"{name}_{found.name}")
    metrics = place.results / f"{name}_metrics.csv"
    if not metrics.is_file():
        raise Unexpected("wrote no metrics.csv")
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["trainer/loss"]) for row in rows if row.get("trainer/loss")]
    rates = [row.get("trainer/tokens_per_second") for row in rows]
    rates = [float(rate) for rate in rates if rate]
    log = (place.results / f"{name}.log").read_text(errors="replace")
    recompiles = len(re.findall(r"Recompiling function", log))
    text = f"loss {losses[0]:.2f} to {losses[-1]:.2f}" if losses else "no loss was logged"
    text += f", {max(rates):,.0f} tokens/s, {recompiles} recompiles" if rates else ""
    if not losses or not losses[-1] < losses[0]:  # nor where it is no number
        raise Unexpected(f"the loss did not fall: {text}")
    given_up = [line.strip() for line in log.splitlines() if GAVE_UP.search(line)]
    if given_up:
        raise Unexpected(f"{text}; the compiler gave up: {given_up[0][:200]}")
    return text


def sampling_figures(place: Place, name: str) -> str:
    """Tokens per second of each way at each batch size."""
    rows = read_json(place, name)["rows"]
    texts = [
        f"batch {row['batch_size']}, compile={row['compiled']}: {row['tokens_per_second']:,.0f}"
        for row in rows
    ]
    return f"tokens/s: {'; '.join(texts)}{_failures(place, name)}"


def same_texts(place: Place, name: str) -> str:
    """How many texts are those of the eager passes.

    Raises:
        Unexpected: one is another.
    """
    rows = read_json(place, name)["rows"]
    text = "; ".join(f"compile={row['compiled']}: {row['equal']} of {row['texts']} equal"
                     for row in rows)  # fmt: skip
    text += _failures(place, name)
    if any(row["equal"] < row["texts"] for row in rows):
        raise Unexpected(text)
    return text


def variants(place: Place, name: str) -> str:
    """Time of each variant, the fastest first."""
    record = read_json(place, name)
    rows = [row for row in record["rows"] if row["seconds"] is not None]
    rows.sort(key=lambda row: row["seconds"])
    texts = []
    for row in rows:
        blocks = f", L = {row['block_size']}" if "block_size" in row else ""
        texts.append(f"{row['name']}{blocks} {row['seconds'] * 1e3:.3g} ms")
    return "; ".join(texts)


def _failures(place: Place, name: str) -> str:
    """What failed within a command that went on."""
    failed = read_json(place, name).get("failed", {})
    return "".join(f"; {what} failed: {why}" for what, why in failed.items())


def last_line(place: Place, name: str) -> str:
    """The last line of a log: pytest's count."""
    lines = (place.results / f"{name}.log").read_text(errors="replace").split("\n")
    return next((line.strip("= ") for line in reversed(lines) if line.strip()), "")


# --- running them ----------------------------------------------------------------------------


def run(command: Command, place: Place, *, part: str, limit: float) -> Outcome:
    """Carry out one command for at most `limit` seconds."""
    outcome = Outcome(part=part, name=command.name, state="ok")
    if command.missing is not None:
        outcome.state = f"left out: {command.missing}"
        return outcome
    if limit < 1:
        outcome.state = "out of time"
        return outcome
    began = time.perf_counter()
    environment = ENVIRONMENT | command.environment
    if place.is_tiny:
        environment |= ENVIRONMENT_OF_REHEARSAL
    log = place.results / f"{command.name}.log"
    code = _logged(command.words, log, limit=limit, environment=environment)
    outcome.seconds = round(time.perf_counter() - began, 1)
    if code is None:
        outcome.state = "out of time"
    elif code:
        outcome.state = f"failed: exit code {code}"
    try:
        outcome.figures = command.figures(place, command.name)
    except Exception as error:  # figures of a broken run may be of any form
        if outcome.state == "ok":
            outcome.state = f"failed: {error or type(error).__name__}"
    return outcome


def _logged(
    words: Words, log: Path, *, limit: float, environment: dict[str, str]
) -> int | None:
    """The exit code, or None at the limit; what is printed goes to the log, too."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=PROJECT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | environment,
    )  # fmt: skip

    def copy() -> None:
        with log.open("wb") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
        _end(process)
    copying.join(KILL_AFTER)
    return code


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, name)
        except ProcessLookupError:
            return
        try:
            process.wait(KILL_AFTER)
        except subprocess.TimeoutExpired:
            continue


def write_summary(place: Place, outcomes: Sequence[Outcome], where: dict) -> str:
    """Write summary.txt and summary.json, and the archive where `OUT` names a folder."""
    lines = [", ".join(f"{key} {value}" for key, value in where.items() if key != "command")]
    for one in outcomes:
        lines.append(f"{one.part}/{one.name}: {one.state}, {one.seconds:g} s")
        lines += [f"    {one.figures}"] * bool(one.figures)
    text = "\n".join(lines) + "\n"
    (place.results / "summary.txt").write_text(text)
    record = where | {"commands": [asdict(one) for one in outcomes]}
    (place.results / "summary.json").write_text(json_text(record, indent=2) + "\n")
    if os.environ.get("OUT"):
        archive = Path(os.environ["OUT"]) / f"{place.results.name}.tar.gz"
        archive.parent.mkdir(parents=True, exist_ok=True)
        partial = archive.with_suffix(".partial")
        with tarfile.open(partial, "w:gz") as file:
            file.add(place.results, arcname=place.results.name)
        partial.replace(archive)
    return text


def chosen(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The names of the parts, which may be given as numbers from 1; all where none is given."""
    names = list(PARTS)
    found = []
    for word in words:
        name = names[int(word) - 1] if word.isdigit() and 0 < int(word) <= len(names) else word
        if name not in PARTS:
            parser.error(f"no part {word}; allowed: {', '.join(names)}, or 1 to {len(names)}")
        found.append(name)
    return [name for name in names if name in found] or names


def main(words: Sequence[str] | None = None) -> int:
    """Carry out the parts that are asked for; 1 where something failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parts = chosen(parser, parser.parse_args(words).parts)
    device = torch.device(os.environ.get("DEVICE") or "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.sh: PyTorch sees no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        print("gpu.sh: no C compiler here, which Triton needs to compile", file=sys.stderr)
    where = description(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{where['date']}-{where['device']}").strip("-")
    is_tiny = bool(os.environ.get("TINY"))
    with tempfile.TemporaryDirectory() as scratch:
        # A rehearsal measures nothing that should be kept.
        results = Path(scratch if is_tiny else PROJECT / "benchmarks" / "results") / name
        results.mkdir(parents=True, exist_ok=True)
        place = Place(device=str(device), is_tiny=is_tiny, results=results, scratch=Path(scratch))
        outcomes = carry_out(parts, place, where, budget=float(os.environ.get("BUDGET") or BUDGET))
    is_bad = [one for one in outcomes if not one.state.startswith(("ok", "left out"))]
    return int(bool(is_bad))


def carry_out(parts: Sequence[str], place: Place, where: dict, *, budget: float) -> list[Outcome]:
    """The parts in turn; the summary is written behind each command, and printed at the end."""
    began, outcomes, text = time.perf_counter(), [], ""
    for part in parts:
        commands, limit = PARTS[part]
        limit = budget if place.is_tiny else limit  # this machine may be slow
        ends = min(budget, time.perf_counter() - began + limit)
        for command in commands(place):
            spent = time.perf_counter() - began
            print(f"\n== {part}: {command.name}, {spent:.0f} s after the start", flush=True)
            outcomes.append(run(command, place, part=part, limit=ends - spent))
            text = write_summary(place, outcomes, where)
    print(f"\n== {time.perf_counter() - began:.0f} s, {place.results}\n{text}", end="")
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
