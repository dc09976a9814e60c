"""What `tests.faults.fuzz` breaks, and who reads it: small whole files of every kind of input."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

import main
import push_to_hf
from checkpointing import convert
from configuration.data_request import data_request
from configuration.resolvers import register_resolvers
from configuration.sampling_request import sampling_request
from corpora.tokenization import (
    byte_tokenizer,
    encode,
    fingerprint,
    load_tokenizer,
    mask_index_and_vocab_size,
    train_bpe,
)
from dataloader import get_dataloaders
from evaluation.generative_perplexity import GenerativePerplexity, ScorerUnavailableError
from modes.starting_weights import load_model
from scripts import log_sample_stats
from tests.faults.fuzz import Kind
from tests.helpers.places import PROJECT
from tests.helpers.small_run import overrides, sentences, write_text

_TINY = ("algo=bd3lm", "block_size=4", "model.n_blocks=1", "algo.clip_search_widths=[0.5]",
         "trainer.max_steps=1", "trainer.limit_val_batches=1")  # fmt: skip
Read = Callable[[Path, Path], None]


def kinds(folder: Path) -> dict[str, Kind]:
    """All of them; `folder` is made, and holds the checkpoint that readers of other files need."""
    register_resolvers()
    folder.mkdir(parents=True)
    write_text(folder)
    checkpoint = _trained(folder)
    return {
        **_configurations(folder, checkpoint),
        **_texts(folder),
        **_prompts(folder),
        **_tokenizers(folder),
        **_weights(folder, checkpoint),
        **_resumed(folder, checkpoint),
        **_tables(folder, checkpoint),
        **_ssd_lm(folder),
    }


def _config(folder: Path, *changes: str) -> DictConfig:
    with initialize_config_dir(str(PROJECT / "configs"), version_base=None):
        return compose("config", overrides(folder, *_TINY, *changes))


def _run(folder: Path, directory: Path, *changes: str) -> None:
    """The whole command, in a directory."""
    before = os.getcwd()
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    try:
        main.run(_config(folder, *changes), launch_dir=str(folder))
    finally:
        os.chdir(before)


def _trained(folder: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        _run(folder, folder / "trained")
    return folder / "trained/checkpoints/last.ckpt"


def _folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# --- configurations -------------------------------------------------------------------------------

_JUNK = ("-1", "0", "null", "abc", "[]", "[1,2]", "{a:1}", "1.5", "true", "1e999", "nan", "''",
         "${nothing}", "???", "/no/such/place", "-0.5")  # fmt: skip
# These may take a directory of their own, the network, or time: max_steps=-1 trains for ever.
_NOT_TRIED = ("hydra", "trainer.max_steps", "loader.num_workers", "trainer.num_nodes", "wandb",
              "data.num_proc")  # fmt: skip


def _configurations(folder: Path, checkpoint: Path) -> dict[str, Kind]:
    keys = [key for key in _leaves(_config(folder)) if not key.startswith(_NOT_TRIED)]

    def draw(random: Random) -> bytes:
        return f"{random.choice(keys)}={random.choice(_JUNK)}".encode()

    def read(source: Path, output: Path) -> None:
        override = (source / "override").read_text()
        mode = {"sampling": "sample_eval", "eval": "ppl_eval"}.get(override.split(".")[0], "train")
        changes = [f"mode={mode}", f"eval.checkpoint_path={checkpoint}", "model.length=16"]
        try:
            _run(folder, source / "run", *changes, override)
        except HydraException as error:  # Hydra prints it, without a traceback
            raise ValueError(f"{override}: {error}") from error

    return {"one key of the configuration": Kind({"override": b""}, read, draw=draw)}


def _leaves(section: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for name in section:
        key = f"{prefix}{name}"
        node = section._get_node(name)
        found += _leaves(node, f"{key}.") if isinstance(node, DictConfig) and len(node) else [key]
    return found


# --- documents ------------------------------------------------------------------------------------


def _texts(folder: Path) -> dict[str, Kind]:
    text = "".join(sentences()[:40])
    lines = "".join(json.dumps({"text": s, "n": 1}) + "\n" for s in sentences()[:40])
    table = pa.table({"text": sentences()[:40]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    content = {
        ".txt": text.encode(),
        ".jsonl": lines.encode(),
        ".txt.gz": gzip.compress(text.encode(), mtime=0),
        ".jsonl.zst": zstandard.compress(lines.encode()),
        ".parquet": buffer.getvalue(),
        "arrow stream": _arrow(table, pa.ipc.new_stream),
        "arrow file": _arrow(table, pa.ipc.new_file),
    }
    request = data_request(_config(folder, "data.num_proc=1"))
    tokenizer = byte_tokenizer()

    def reader(name: str) -> Read:
        def read(source: Path, output: Path) -> None:
            own = dataclasses.replace(
                request, train_path=str(source / name), cache_dir=str(source / "cache")
            )
            loader, _ = get_dataloaders(own, tokenizer, skip_valid=True)
            next(iter(loader))

        return read

    names = {end: f"text.{end.split()[0].lstrip('.')}" for end in content}
    # What the cut-off beginning of a text leaves is too few rows.
    found = {
        f"text as {end}": Kind({name: content[end]}, reader(name), names=("loader.batch_size",))
        for end, name in names.items()
    }
    found["text as streamed .jsonl"] = Kind(
        {"text.jsonl": lines.encode()}, _streamed(request), names=("loader.batch_size",)
    )
    found["text8, zipped"] = _text8(folder)
    return found


def _arrow(table: pa.Table, kind: Callable) -> bytes:
    buffer = io.BytesIO()
    with kind(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def _streamed(request) -> Read:
    def read(source: Path, output: Path) -> None:
        own = dataclasses.replace(request, train_path=str(source / "text.jsonl"), streaming=True)
        loader, _ = get_dataloaders(own, byte_tokenizer(), skip_valid=True)
        for _ in loader:
            pass

    return read


def _text8(folder: Path) -> Kind:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", "the quick brown fox " * 500)
    config = _config(folder)
    config.data.train = config.data.valid = "text8"
    config.data.train_path = config.data.valid_path = None
    request = dataclasses.replace(data_request(config), num_proc=1)
    tokenizer = load_tokenizer("text8")

    def read(source: Path, output: Path) -> None:
        own = dataclasses.replace(
            request, path=str(source / "text8.zip"), cache_dir=str(source / "cache")
        )
        loader, _ = get_dataloaders(own, tokenizer, skip_valid=True)
        next(iter(loader))

    return Kind({"text8.zip": buffer.getvalue()}, read, names=("loader.batch_size",))


# --- prompts --------------------------------------------------------------------------------------


def _prompts(folder: Path) -> dict[str, Kind]:
    tokenizer = byte_tokenizer()
    mask_index, _ = mask_index_and_vocab_size(tokenizer)
    request = sampling_request(_config(folder, "mode=sample_eval"))

    def reader(key: str, name: str) -> Read:
        def read(source: Path, output: Path) -> None:
            own = dataclasses.replace(request, **{key: str(source / name)})
            own.canvas_rows(tokenizer, mask_index=mask_index)

        return read

    prompts = "The old mill\nA quiet harbour\n"
    as_json = '{"prompt": "The old mill"}\n{"prompt": "A quiet \\u00e9", "n": 2}\n'
    gaps = '{"text": "The [MASK:3] mill"}\n{"text": "A [MASK] harbour"}\n'
    return {
        "prompts, a line each": Kind(
            {"prompts.txt": prompts.encode()}, reader("prompts", "prompts.txt"),
            names=("sampling.prompts",),
        ),
        "prompts as .jsonl": Kind(
            {"prompts.jsonl": as_json.encode()}, reader("prompts", "prompts.jsonl"),
            names=("sampling.prompts",),
        ),
        "texts with gaps": Kind(
            {"gaps.jsonl": gaps.encode()}, reader("infill", "gaps.jsonl"),
            names=("sampling.infill",),
        ),
    }  # fmt: skip


# --- tokenizers -----------------------------------------------------------------------------------


def _tokenizers(folder: Path) -> dict[str, Kind]:
    saved = folder / "tokenizer"
    train_bpe(sentences(), vocab_size=280).save_pretrained(saved)

    def read(source: Path, output: Path) -> None:
        tokenizer = load_tokenizer(str(source))
        mask_index_and_vocab_size(tokenizer)
        fingerprint(tokenizer)
        tokenizer.decode(encode(tokenizer, ["The old mill, \u00e9 [MASK]."])[0])

    return {"tokenizer": Kind(_folder_files(saved), read, names=("data.tokenizer_name_or_path",))}


# --- weights --------------------------------------------------------------------------------------


def _weights(folder: Path, checkpoint: Path) -> dict[str, Kind]:
    config, tokenizer = _config(folder, "mode=ppl_eval"), byte_tokenizer()
    hub, single = folder / "hub", folder / "model.safetensors"
    with contextlib.redirect_stdout(io.StringIO()):
        assert convert.main([str(checkpoint), str(hub)]) == 0
        assert convert.main([str(checkpoint), str(single)]) == 0

    def evaluate(name: str) -> Read:
        def read(source: Path, output: Path) -> None:
            own = config.copy()
            own.eval.checkpoint_path = str(source / name)
            load_model(own, tokenizer)

        return read

    def converted(name: str) -> Read:
        def read(source: Path, output: Path) -> None:
            _command(convert.main, str(source / name), str(output / "written.safetensors"))

        return read

    def published(name: str) -> Read:
        def read(source: Path, output: Path) -> None:
            arguments = [str(source / name), "me/it", "--dry-run", str(output / "export")]
            _command(push_to_hf.main, *arguments, "--tokenizer", "bytes")

        return read

    files = {
        "checkpoint": ("last.ckpt", {"last.ckpt": checkpoint.read_bytes()}),
        "Hub directory": ("", _folder_files(hub)),
        "safetensors file": ("w.safetensors", {"w.safetensors": single.read_bytes()}),
    }
    # Where a description differs from the run, its keys are named.
    keys = ("eval.checkpoint_path", "eval.disable_ema", "--set", "--tokenizer")
    readers = {"evaluated": evaluate, "converted": converted, "published": published}
    return {
        f"{what}, {verb}": Kind(content, reader(name), names=keys)
        for what, (name, content) in files.items()
        for verb, reader in readers.items()
    }


def _command(command: Callable, *arguments: str) -> None:
    """A program that prints its error in a line and returns 1, or exits with the line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            status = command(list(arguments))
    except SystemExit as stop:
        status = stop.code
    if status:
        message = status if isinstance(status, str) else said.getvalue().strip()
        lines = [line for line in message.splitlines() if line.strip()]
        if len(lines) != 1:
            raise AssertionError(f"{len(lines)} lines: {message}")
        raise ValueError(message)


def _resumed(folder: Path, checkpoint: Path) -> dict[str, Kind]:
    """A training that goes on from a broken checkpoint, or in a directory of broken files."""

    def named(source: Path, output: Path) -> None:
        _run(folder, source / "run", "trainer.max_steps=2",
             f"checkpointing.resume_ckpt_path={source}/last.ckpt")  # fmt: skip

    def in_place(source: Path, output: Path) -> None:
        _run(folder, source / "run", "trainer.max_steps=2", f"checkpointing.save_dir={source}")

    trained = checkpoint.parents[1]
    around = {"manifest.json": (trained / "manifest.json").read_bytes(),
              "checkpoints/last.ckpt": checkpoint.read_bytes()}  # fmt: skip
    return {
        "checkpoint, trained on": Kind({"last.ckpt": checkpoint.read_bytes()}, named),
        "save_dir, trained on in": Kind(around, in_place),
    }


# --- tables, scorers ------------------------------------------------------------------------------


def _tables(folder: Path, checkpoint: Path) -> dict[str, Kind]:
    csv = "gen_ppl,gen_nfes,gen_entropy,gen_lengths,samples,seed\n" + "".join(
        f'{20.5 + i},{64 + i},4.5,64,"a text, {i}\nof ""lines""",{i}\n' for i in range(5)
    )
    rows = [dict(gen_ppl=2.5, gen_nfes=3, gen_entropy=1.5, gen_lengths=4, samples="é", seed=i)
            for i in range(3)]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)

    def statistics(name: str) -> Read:
        return lambda source, output: _command(log_sample_stats.main, str(source / name))

    def results(source: Path, output: Path) -> None:
        _command(push_to_hf.main, str(checkpoint), "me/it", "--dry-run", str(output / "export"),
                 "--tokenizer", "bytes", "--results", str(source / "ppl_eval.json"))  # fmt: skip

    evaluated = {"val/nll": 3.25, "val/ppl": 25.79, "val/bpd": 4.689, "num_tokens": 123,
                 "num_rows": 12, "data": "local", "config_hash": "0"}  # fmt: skip
    torch.manual_seed(0)
    scorer = folder / "scorer"
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=32, n_embd=16, n_layer=1, n_head=2)
                    ).save_pretrained(scorer)  # fmt: skip
    byte_tokenizer().save_pretrained(scorer)

    def score(source: Path, output: Path) -> None:
        try:
            loaded = GenerativePerplexity.load(str(source), device=torch.device("cpu"))
            loaded.score(["The old mill"], max_length=16, batch_size=1)
        except ScorerUnavailableError as error:
            raise ValueError(str(error)) from error

    return {
        "samples.csv": Kind({"samples.csv": csv.encode()}, statistics("samples.csv")),
        "samples.jsonl": Kind({"samples.jsonl": lines.encode()}, statistics("samples.jsonl")),
        "results for a card": Kind({"ppl_eval.json": json.dumps(evaluated).encode()}, results),
        "scorer": Kind(_folder_files(scorer), score,
                       names=("eval.gen_ppl_eval_model_name_or_path",)),
    }  # fmt: skip


# --- SSD-LM ---------------------------------------------------------------------------------------


def _ssd_lm(folder: Path) -> dict[str, Kind]:
    if str(PROJECT / "ssd-lm") not in sys.path:  # no import statement can name it
        sys.path.append(str(PROJECT / "ssd-lm"))
    import generate_text
    import ssd_model

    saved = folder / "ssd-lm"
    size, hidden = 260, 16
    RobertaForMaskedLM(RobertaConfig(
        vocab_size=size, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )).save_pretrained(saved)  # fmt: skip
    torch.save({"weight": torch.randn(hidden, size)}, saved / ssd_model.EMBED_SUM)
    torch.save({"weight": torch.randn(hidden, 1), "bias": torch.randn(hidden)},
               saved / ssd_model.TIMESTEP)  # fmt: skip
    byte_tokenizer().save_pretrained(saved)

    def load(source: Path, output: Path) -> None:
        model = ssd_model.load_model(str(source))
        ssd_model.load_tokenizer(None, model=str(source), vocab_size=model.vocab_size)

    arguments = ["--model", str(saved), "--length", "4", "--block_size", "2", "--T", "1",
                 "--num_samples", "1", "--batch_size", "1", "--device", "cpu"]  # fmt: skip
    first = folder / "ssd.json"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        generate_text.main([*arguments, "--output", str(first)])

    def goes_on(source: Path, output: Path) -> None:
        generate_text.parse_arguments([*arguments, "--output", str(source / "ssd.json")])

    return {
        "SSD-LM's files": Kind(_folder_files(saved), load, names=("--model", "--tokenizer")),
        "SSD-LM's samples": Kind({"ssd.json": first.read_bytes()}, _exits(goes_on)),
    }


def _exits(read: Read) -> Read:
    """Of argparse: its error is a line after the usage."""

    def wrapped(source: Path, output: Path) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                read(source, output)
        except SystemExit as stop:
            raise ValueError(said.getvalue().strip().splitlines()[-1]) from stop

    return wrapped
