"""`python -m checkpointing.convert SRC DST`: weights from one file format to another.

SRC is anything that `eval.checkpoint_path` takes. DST is a Lightning checkpoint in the original's
layout (`.ckpt`), a `.safetensors` file, or else a directory in Hub format. Every weight must fit
the network that SRC describes. What is at DST is replaced at the end, or not at all.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpointing.description import KEYS, PARAMETERIZATIONS, completed, to_run_config
from checkpointing.hub_directory import (
    replacing,
    write_hub_directory,
    write_safetensors,
    write_tokenizer_record,
)
from checkpointing.loading import LoadReport, matching_weights
from checkpointing.weights import Weights, read_weights
from models.dit import DIT, DITConfig
from models.rotary import Rotary
from utils import one_line, print_without_fail

FORMATS = ("lightning", "hub", "safetensors")
FREQUENCIES = "backbone.rotary_emb.inv_freq"
RANGE = ("sampling_eps_min", "sampling_eps_max")
# Of a moving average that starts now; the paper's decay.
FRESH_AVERAGE = {"decay": 0.9999, "num_updates": 0}


def convert(
    source: str,
    destination: Path,
    *,
    to: str,
    which: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> LoadReport:
    """Write the weights of `source` in another format.

    Args:
        source: a checkpoint, a .safetensors file, a directory in Hub format or a Hub id.
        destination: replaced as a whole; other files of a directory stay.
        to: one of `FORMATS`.
        which: `ema` or `raw`. None: a Lightning checkpoint keeps both, the others hold the average
            where the source has one.
        changes: what the source does not say of its model, or says wrongly; see
            `description.KEYS`.

    Returns:
        What matched.

    Raises:
        ValueError: the weights do not fit, or the source does not say enough.
        OSError: the source is missing, or the destination cannot be written.
    """
    weights = read_weights(source)
    if which == "ema" and weights.shadow_params is None:
        raise ValueError(f"{source}: has no moving average; allowed without --ema")
    hub_config = _known(weights, changes or {}, to=to)
    model = described_model(hub_config, with_range=RANGE[0] in weights.state_dict)
    average, report = matching_weights(model, weights, use_ema=which != "raw")
    tensors = average
    if to == "lightning" and which is None:
        tensors, _ = matching_weights(model, weights, use_ema=False)
    if to == "lightning":
        parameters = [name for name, _ in model.named_parameters()]
        checkpoint = lightning_checkpoint(
            _in_order(model, tensors, hub_config),
            shadow_params=[average[name] for name in parameters],
            progress=FRESH_AVERAGE | (weights.ema_progress if which is None else {}),
            hub_config=hub_config,
            tokenizer=weights.tokenizer,
        )
        with replacing(destination) as partial:
            torch.save(checkpoint, partial)
    elif to == "hub":
        write_hub_directory(destination, tensors, hub_config)
        write_tokenizer_record(destination, weights.tokenizer)
    else:
        write_safetensors(
            destination, tensors, hub_config=hub_config, tokenizer=weights.tokenizer
        )
    return report


def _known(weights: Weights, changes: Mapping[str, Any], *, to: str) -> dict[str, Any]:
    """The description of the source with the user's changes, as far as the format needs it."""
    for key in changes:
        if key not in KEYS:
            raise ValueError(f"--set {key}: allowed are {', '.join(KEYS)}")
    hub_config = completed(weights.hub_config | dict(changes))
    if hub_config["algo"] not in (None, *PARAMETERIZATIONS):
        known = ", ".join(PARAMETERIZATIONS)
        raise ValueError(f"--set algo={hub_config['algo']}: allowed are {known}")
    needed = ["vocab_size", "hidden_dim", "n_blocks", "n_heads"]
    needed += ["cond_dim"] if hub_config["adaln"] else []
    needed += ["algo", "model_length", "block_size"] if to != "safetensors" else []
    missing = [key for key in needed if hub_config[key] is None]
    if missing:
        raise ValueError(
            f"{weights.source}: does not say its {', '.join(missing)}; add "
            + " ".join(f"--set {key}=..." for key in missing)
        )
    return hub_config


def described_model(hub_config: Mapping[str, Any], *, with_range: bool) -> nn.Module:
    """A module with the names and shapes of the description, and no numbers (meta device)."""
    module = nn.Module()
    with torch.device("meta"):
        if with_range:
            for name in RANGE:
                module.register_buffer(name, torch.zeros(()))
        module.backbone = DIT(
            DITConfig(
                vocab_size=hub_config["vocab_size"],
                block_size=hub_config["block_size"] or 1,
                hidden_size=hub_config["hidden_dim"],
                cond_dim=hub_config["cond_dim"] or 1,
                n_blocks=hub_config["n_blocks"],
                n_heads=hub_config["n_heads"],
                adaln=bool(hub_config["adaln"]),
            )
        )
    return module


def _in_order(
    model: nn.Module, tensors: Mapping[str, Tensor], hub_config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors in the order of the network, with the frequencies that some files lack."""
    head_dim = hub_config["hidden_dim"] // hub_config["n_heads"]
    every = {FREQUENCIES: Rotary(head_dim).frequencies()} | dict(tensors)
    return {name: every[name] for name in model.state_dict() if name in every}


def lightning_checkpoint(
    state_dict: Mapping[str, Tensor],
    *,
    shadow_params: list[Tensor],
    progress: Mapping[str, float | int],
    hub_config: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A checkpoint in the original's layout, of plain containers and tensors.

    Weights to evaluate or to start from: there is no optimizer to resume with.

    Args:
        state_dict: all weights, in the order of the network.
        shadow_params: the moving average, in the order of the parameters.
        progress: `decay` and `num_updates` of the average.
        hub_config: becomes the part of `hyper_parameters` that is known.
        tokenizer: that of the training, see `Weights.tokenizer`.
    """
    copies = {id(tensor): tensor.detach().clone() for tensor in (*state_dict.values(),
                                                                 *shadow_params)}  # fmt: skip
    none_done = {"current": {"completed": 0}}
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {name: copies[id(tensor)] for name, tensor in state_dict.items()},
        # The original reads these when it loads.
        "loops": {
            "fit_loop": {"epoch_progress": none_done, "epoch_loop.batch_progress": none_done}
        },
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": to_run_config(hub_config)},
        "ema": dict(progress) | {"shadow_params": [copies[id(tensor)] for tensor in shadow_params]},
    }
    if tokenizer is not None:
        checkpoint["tokenizer"] = dict(tokenizer)
    ends = {name: copies[id(state_dict[name])] for name in RANGE if name in state_dict}
    return checkpoint | ends


def format_of(destination: str) -> str:
    """The format that a name asks for."""
    if destination.endswith((".ckpt", ".pt", ".pth")):
        return "lightning"
    return "safetensors" if destination.endswith(".safetensors") else "hub"


def _change(text: str) -> tuple[str, Any]:
    key, is_assignment, value = text.partition("=")
    if not is_assignment:
        raise argparse.ArgumentTypeError(f"{text}: allowed is key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main(arguments: list[str] | None = None) -> int:
    """Convert, print the report, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m checkpointing.convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="checkpoint, .safetensors, directory, Hub id")
    parser.add_argument("destination", metavar="DST", help="file or directory to write")
    parser.add_argument("--to", choices=FORMATS, help="by default what the name of DST says")
    which = parser.add_mutually_exclusive_group()
    for name, text in (("ema", "the moving average"), ("raw", "the weights without averaging")):
        which.add_argument(
            f"--{name}", dest="which", action="store_const", const=name, help=f"write {text}"
        )
    parser.add_argument(
        "--set", dest="changes", metavar="KEY=VALUE", type=_change, action="append", default=[],
        help="what SRC does not say of its model, under the names of a Hub config.json",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    to = options.to or format_of(options.destination)
    try:
        report = convert(
            options.source,
            Path(options.destination),
            to=to,
            which=options.which,
            changes=dict(options.changes),
        )
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    print(report)
    print(f"{options.destination}: written ({to})")
    return 0


if __name__ == "__main__":
    print_without_fail()
    raise SystemExit(main())
