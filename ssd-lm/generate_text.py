"""Samples from SSD-LM: `python ssd-lm/generate_text.py --length 1025 --T 1000 --output FILE`.

Writes one JSON file, again after each batch. A sample depends on the settings, the seed and its
own index alone, not on the batch; so a run that was stopped goes on where it was when the same
command is given again, and more samples are added to a file by a larger --num_samples.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Python puts this folder on the path, not the project whose modules are shared.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssd_model import PUBLISHED, TOKENIZER, SSDModel, load_model, load_tokenizer
from ssd_sampling import RowDraws, SSDSettings, sample_text

from utils import derive_seed, json_text, made_current, print_without_fail, write_text

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def number(kind: type, allowed: str, is_allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Reads an argument as `kind`; anything else is refused with what is allowed."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r}: allowed are {allowed}")
        return value

    return read


POSITIVE = number(int, "integers from 1", lambda value: value >= 1)
SEED = number(int, "integers from 0", lambda value: value >= 0)
PROBABILITY = number(float, "numbers in (0, 1]", lambda value: 0 < value <= 1)
SCALE = number(float, "positive numbers", lambda value: 0 < value < float("inf"))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is not allowed ends the program before anything is loaded."""
    default = SSDSettings()
    parser = argparse.ArgumentParser(
        prog="generate_text.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=PUBLISHED, help="Hub id or directory of the weights")
    add("--tokenizer", help=f"Hub id or directory; None: the model's directory, or {TOKENIZER}")
    add("--length", type=POSITIVE, default=1025, help="tokens per sample, a multiple of the block")
    add("--block_size", type=POSITIVE, default=default.block_size, help="tokens per block")
    add("--T", type=POSITIVE, default=default.num_steps, help="denoising steps per block")
    add("--top_p", type=PROBABILITY, default=default.top_p, help="nucleus of the projection")
    add("--one_hot_value", type=SCALE, default=default.one_hot_value, help="scale of the logits")
    add("--seed", type=SEED, default=1, help="other seeds give other samples")
    add("--batch_size", type=POSITIVE, default=25, help="samples drawn together")
    add("--num_samples", type=POSITIVE, default=25, help="samples in all")
    add("--output", default="ssd_samples.json", help="JSON file to write")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=PRECISIONS, default="float32", help="of the network")
    args = parser.parse_args(arguments)
    size = args.block_size
    if args.length % size:
        below, above = args.length // size * size, (args.length // size + 1) * size
        nearest = f"{below} and {above}" if below else str(above)
        parser.error(
            f"argument --length: {args.length} is no multiple of --block_size {size}; the nearest "
            f"allowed: {nearest}"
        )
    try:
        args.device = find_device(args.device)
        read_samples(args.output, settings=settings_of(args))
    except ValueError as error:
        parser.error(str(error))
    return args


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: this machine has no such device.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    allowed = ["cpu", "cuda"][: 1 + has_gpu]
    allowed += [f"cuda:{i}" for i in range(torch.cuda.device_count() if has_gpu else 0)]
    if name not in allowed:
        raise ValueError(f"argument --device: {name}: allowed here are auto, {', '.join(allowed)}")
    return made_current(torch.device(name))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the samples besides their index, as it stands in the file."""
    names = ("model", "tokenizer", "length", "block_size", "T", "top_p", "one_hot_value", "seed",
             "precision")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def read_samples(path: str, *, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples that a file already holds; none where there is no file.

    Raises:
        ValueError: it is no file of samples, or its samples have other settings.
    """
    if not Path(path).exists():
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        found, samples = content["settings"], content["samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"argument --output: {path} exists and is no file of samples ({error}); give another"
        ) from error
    if found != settings:
        other = [name for name in settings if found.get(name) != settings[name]]
        raise ValueError(
            f"argument --output: {path} holds samples of another run, which differs in "
            f"{', '.join(f'--{name} {found.get(name)!r}' for name in other)}; give another file"
        )
    return samples


def write_samples(path: str, *, settings: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Write the file whole or not at all."""
    content = {"settings": settings, "samples": samples}
    write_text(path, json_text(content, ensure_ascii=False) + "\n")


def draw(
    model: SSDModel, *, indices: range, start: int, args: argparse.Namespace, on_pass: Callable
) -> Tensor:
    """The samples of these indices, (B, length) on the CPU; `on_pass` runs after each pass."""
    generators = []
    for index in indices:
        generator = torch.Generator(args.device)
        generators.append(generator.manual_seed(derive_seed(args.seed, index)))

    def network(x_t: Tensor, context: Tensor, progress: float) -> Tensor:
        dtype = PRECISIONS[args.precision]
        with torch.autocast(args.device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(x_t, context, progress)
        on_pass()
        return logits

    tokens = sample_text(
        network,
        torch.full((len(indices), 1), start, device=args.device),
        length=args.length,
        vocab_size=model.vocab_size,
        settings=SSDSettings(
            block_size=args.block_size,
            num_steps=args.T,
            top_p=args.top_p,
            one_hot_value=args.one_hot_value,
        ),
        draws=RowDraws(generators),
    )
    return tokens.cpu()


def records(
    tokens: Tensor, *, indices: range, tokenizer: PreTrainedTokenizerBase, nfe: int
) -> Iterator[dict[str, Any]]:
    """What the file says of each sample."""
    for index, row in zip(indices, tokens.tolist(), strict=True):
        # A scorer would read "</s>" as ordinary characters; the ids keep every token.
        text = tokenizer.decode(row, skip_special_tokens=True)
        yield {"index": index, "text": text, "tokens": row, "nfe": nfe}


def generate(args: argparse.Namespace, *, console: Console) -> int:
    """Draw what the file lacks, and write it after each batch; returns how many were drawn."""
    settings = settings_of(args)
    samples = read_samples(args.output, settings=settings)
    first, nfe = len(samples), args.length // args.block_size * args.T
    model = load_model(args.model)
    if args.block_size > model.max_block_size:
        raise ValueError(
            f"--block_size {args.block_size}: with the block before it, this exceeds the model's "
            f"positions; allowed are 1 to {model.max_block_size}"
        )
    tokenizer = load_tokenizer(args.tokenizer, model=args.model, vocab_size=model.vocab_size)
    model = model.to(args.device)
    write_samples(args.output, settings=settings, samples=samples)  # now, not after hours
    starts = range(first, args.num_samples, args.batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("forward passes"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Sampling", total=len(starts) * nfe)
        for begin in starts:
            indices = range(begin, min(begin + args.batch_size, args.num_samples))
            tokens = draw(
                model,
                indices=indices,
                start=tokenizer.bos_token_id,
                args=args,
                on_pass=lambda: progress.advance(task),
            )
            samples += records(tokens, indices=indices, tokenizer=tokenizer, nfe=nfe)
            write_samples(args.output, settings=settings, samples=samples)
    return len(samples) - first


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse_arguments(arguments)
    # What transformers reports while loading, `load_model` checks.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(stderr=True)
    begin = time.perf_counter()
    try:
        count = generate(args, console=console)
    except (OSError, ValueError) as error:
        print(f"generate_text.py: error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - begin
    print(
        f"{args.output}: {count} new samples of {args.length} tokens in {seconds:.1f} s "
        f"({count * args.length / seconds:.1f} tokens/s, loading included)"
    )
    return 0


if __name__ == "__main__":
    print_without_fail()
    raise SystemExit(main())
