"""Publish a checkpoint on the Hugging Face Hub.

    python push_to_hf.py CHECKPOINT OWNER/NAME [--dry-run DIRECTORY]

The directory holds weights, tokenizer, a model card, and the code that loads them without this
project. Everything is checked and written before anything is uploaded.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from checkpointing.description import completed
from checkpointing.hub_directory import write_tokenizer_record
from checkpointing.loading import load_weights
from checkpointing.weights import Weights, read_weights
from configuration.data_request import data_request
from corpora.registry import DATASETS
from corpora.tokenization import bpe_size, load_tokenizer, mask_index_and_vocab_size
from corpora.tokenizer_record import recorded_bpe, what_differs
from dataloader import get_tokenizer
from hf import BD3LM, BD3LMConfig
from hf.model_card import model_card, read_results
from hf.modeling_bd3lm import auto_map
from utils import one_line, print_without_fail

# What a network cannot be built without.
NEEDED = ("algo", "vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Publish a checkpoint on the Hugging Face Hub.")
    parser.add_argument("checkpoint", help="Lightning checkpoint, .safetensors file, Hub-format "
                        "directory or Hub id")  # fmt: skip
    parser.add_argument("repo_id", help="OWNER/NAME on the Hub")
    parser.add_argument("--dry-run", metavar="DIRECTORY", help="write it there, upload nothing")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--revision", help="branch, made where it does not exist")
    parser.add_argument("--raw", "--no-ema", action="store_true", dest="raw",
                        help="the weights of the last step, not their moving average")  # fmt: skip
    parser.add_argument("--tokenizer", help="text8, bytes, a folder or a Hub id; by default the "
                        "checkpoint's")  # fmt: skip
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE",
                        help="what mode=ppl_eval wrote, for the card's table")  # fmt: skip
    parser.add_argument("--license", default="apache-2.0", help="of the weights, for the card")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the directory, or uploads it; errors end the program with a line."""
    args = parse(arguments)
    try:
        validate_repo_id(args.repo_id)
        if args.dry_run is not None:
            with replacing_directory(Path(args.dry_run)) as directory:
                write_directory(directory, args)
            print(f"Written to {args.dry_run}; nothing was uploaded")
            return
        with tempfile.TemporaryDirectory() as directory:
            write_directory(Path(directory), args)
            upload(directory, args)
        print(f"Published: https://huggingface.co/{args.repo_id}")
    except HFValidationError as error:
        sys.exit(f"REPO_ID {args.repo_id}: {error}")
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))


def upload(directory: str, args: argparse.Namespace) -> None:
    """Uploads the files in one commit, with the token of `hf auth login` or HF_TOKEN.

    Raises:
        OSError: says what kind of error it was; its text may quote the request and its token.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(args.repo_id, private=args.private, exist_ok=True)
        if args.revision is not None:
            api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
        api.upload_folder(
            repo_id=args.repo_id,
            folder_path=directory,
            revision=args.revision,
            commit_message="Upload model, tokenizer and code",
        )
    except Exception as error:  # those of the transport have no common class
        response = getattr(error, "response", None)
        status = f", status {response.status_code}" if response is not None else ""
        raise OSError(
            f"{args.repo_id}: the Hub was not reached or refused ({type(error).__name__}{status}); "
            "`hf auth login`, or a token in HF_TOKEN that may write there, is needed. --dry-run "
            "DIRECTORY writes the files all the same"
        ) from None


# --- the directory --------------------------------------------------------------------------------


def write_directory(directory: Path, args: argparse.Namespace) -> None:
    """Everything that is published.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no such results.
        ValueError: the checkpoint lacks something, or does not fit the tokenizer.
    """
    results = [read_results(path) for path in args.results]
    weights = read_weights(args.checkpoint)
    run = OmegaConf.create(weights.run_config)
    tokenizer = find_tokenizer(args, run, weights)
    config = model_config(weights, tokenizer)
    model = BD3LM(config)
    print(load_weights(model, weights, use_ema=not args.raw))
    origin = None
    if weights.shadow_params is not None:
        origin = "those of the last step" if args.raw else "the moving average of training"
    model.save_pretrained(directory)
    # BERT's tokenizer would also make token_type_ids, which this model has no use for.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    tokenizer.save_pretrained(directory)
    write_tokenizer_record(directory, weights.tokenizer)
    dataset = DATASETS.get(OmegaConf.select(run, "data.train") or "")
    card = model_card(
        args.repo_id,
        config,
        num_parameters=model.num_parameters(),
        origin=origin,
        dataset=dataset.hub.repo if dataset is not None and dataset.hub is not None else None,
        results=results,
        license_name=args.license,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def find_tokenizer(
    args: argparse.Namespace, run: DictConfig, weights: Weights
) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer`, or of the checkpoint.

    Raises:
        ValueError: there is none, it cannot be loaded, or it is not that of the training.
    """
    tokenizer = _named_tokenizer(args, run, weights)
    differs = weights.tokenizer and what_differs(weights.tokenizer, tokenizer)
    if differs:
        raise ValueError(
            f"--tokenizer: {differs}; allowed with {weights.source} is the one that it was "
            f"trained with, {weights.tokenizer.get('name')}"
        )
    return tokenizer


def _named_tokenizer(
    args: argparse.Namespace, run: DictConfig, weights: Weights
) -> PreTrainedTokenizerBase:
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    record = weights.tokenizer or {}
    tokenizer = recorded_bpe(record, name=str(record.get("name")), source=weights.source)
    if tokenizer is not None:
        return tokenizer
    if OmegaConf.select(run, "data.tokenizer_name_or_path") is not None:
        try:
            return recorded_tokenizer(run)
        except Exception as error:  # a cache, data or a Hub that is not here
            raise ValueError(
                f"{args.checkpoint}: its tokenizer "
                f"{OmegaConf.select(run, 'data.tokenizer_name_or_path')} cannot be loaded here "
                f"({error}); --tokenizer names a folder with its files"
            ) from error
    folder = Path(args.checkpoint)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(str(folder))
    raise ValueError(
        f"{args.checkpoint} does not say which tokenizer it was trained with; --tokenizer names "
        "it, for the published models gpt2"
    )


def recorded_tokenizer(run: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run; a `bpe-N` is one that its data set's cache holds."""
    name = run.data.tokenizer_name_or_path
    return load_tokenizer(name) if bpe_size(name) is None else get_tokenizer(data_request(run))


def model_config(weights: Weights, tokenizer: PreTrainedTokenizerBase) -> BD3LMConfig:
    """What config.json will say. Files that name no schedule are of models with the default one.

    Raises:
        ValueError: names what the checkpoint does not say, or a vocabulary that does not fit.
    """
    said = {k: v for k, v in completed(weights.hub_config).items() if v is not None}
    missing = [name for name in NEEDED if name not in said]
    if missing:
        raise ValueError(
            f"{weights.source} does not say {', '.join(missing)} of its model; `python -m "
            f"checkpointing.convert {weights.source} DIRECTORY "
            + " ".join(f"--set {name}=..." for name in missing)
            + "` makes a directory that does"
        )
    mask_index, vocab_size = mask_index_and_vocab_size(tokenizer)
    if vocab_size != said["vocab_size"]:
        raise ValueError(
            f"--tokenizer: {vocab_size} ids with the mask, allowed with {weights.source} are "
            f"{said['vocab_size']}; it must be the tokenizer that the model was trained with"
        )
    known = BD3LMConfig().to_dict().keys() - {"model_type"}
    fields = {name: value for name, value in said.items() if name in known}
    for name in ("sampling_eps_min", "sampling_eps_max"):
        if name in fields:
            fields[name] = round(fields[name], 6)  # float32 in the file
    defaults = {
        "block_size": said["model_length"],
        "adaln": "backbone.sigma_map.mlp.0.weight" in weights.state_dict,
        "var_min": "sampling_eps_min" in weights.state_dict,
    }
    ids = {
        "mask_index": mask_index,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return BD3LMConfig(**(defaults | fields | ids), noise=weights.noise or "loglinear")


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, which takes its place when the block ends without an error.

    Raises:
        ValueError: if what is there is no earlier export.
        OSError: what was there is there again.
    """
    path = path.absolute()
    if path.exists() and not _may_be_replaced(path):
        raise ValueError(
            f"--dry-run {path}: allowed is a new or empty directory, or what an earlier --dry-run "
            "wrote, which is replaced"
        )
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _may_be_replaced(path: Path) -> bool:
    if not path.is_dir():
        return False
    entries = list(path.iterdir())
    if not entries:
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # A clone has a folder .git, which is more than an export.
    said, ours = config.get("auto_map") or {}, auto_map(BD3LMConfig())
    is_ours = bool(said) and said.items() <= ours.items()
    return is_ours and all(entry.is_file() for entry in entries)


if __name__ == "__main__":
    print_without_fail()
    main()
