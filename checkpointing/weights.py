"""Weights read from files: what they are called, and what the file says of their model.

Lightning checkpoints of the original or of this code, Hub-format directories, Hub ids, safetensors.
Nothing here runs code from a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
from torch import Tensor

from checkpointing import description
from checkpointing.hub_directory import (
    CONFIG,
    TOKENIZER,
    download,
    looks_like_hub_id,
    read_hub_directory,
    read_json,
    read_safetensors,
    read_safetensors_metadata,
)
from checkpointing.torch_file import read_torch_file
from utils import file_exists


@dataclass(frozen=True)
class Weights:
    """Named tensors of a model, and the moving average where the file has one.

    Attributes:
        source: where they come from, for messages.
        state_dict: tensors under their checkpoint names (`backbone....`).
        shadow_params: the average, in the order of the parameters.
        ema_progress: its decay and num_updates, where there are shadow_params.
        block_size: L of block diffusion, where the file says so.
        hub_config: what is known of the model under the names of a Hub config.json, see
            `description.KEYS`; None where the file does not say.
        run_config: the configuration of the training, nested, as far as a Lightning checkpoint has
            one.
        noise: the name of the schedule, where the file says it.
        tokenizer: that it was trained with, see `corpora.tokenizer_record`; None where the file
            does not say.
    """

    source: str
    state_dict: dict[str, Tensor]
    shadow_params: list[Tensor] | None = None
    block_size: int | None = None
    hub_config: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(description.KEYS))
    ema_progress: dict[str, float | int] = field(default_factory=dict)
    run_config: dict[str, Any] = field(default_factory=dict)
    noise: str | None = None
    tokenizer: dict[str, Any] | None = None

    def without_clipped_range(self) -> "Weights":
        """The same without the clipped range, which fine-tuning takes from its config."""
        kept = {k: v for k, v in self.state_dict.items() if not k.startswith("sampling_eps_")}
        return replace(self, state_dict=kept)


def read_checkpoint(path: str) -> dict[str, Any]:
    """A Lightning checkpoint as a dictionary of tensors, plain containers and placeholders.

    Args:
        path: a file, local or any place fsspec reaches.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint.
    """
    if not file_exists(path):
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        checkpoint = read_torch_file(path)
    except Exception as error:  # bytes that are no pickle fail in every possible way
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({reason})") from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{path}: not a Lightning checkpoint, it has no 'state_dict'")
    return checkpoint


def read_weights(source: str) -> Weights:
    """Weights from a checkpoint, a .safetensors file, a Hub-format directory or a Hub id.

    Args:
        source: a path, or `owner/name` or `owner/name@revision` of the Hub.

    Raises:
        FileNotFoundError: if there is no such file, directory or (without network) Hub download.
        ValueError: if a file is not what its name says.
    """
    place = source
    if not file_exists(source) and looks_like_hub_id(source):
        place = download(source)
    if not file_exists(place):
        raise FileNotFoundError(f"{source}: there is no such checkpoint, directory or Hub id")
    fs, name = fsspec.core.url_to_fs(place)
    if fs.isdir(name):
        hub_config, tensors = read_hub_directory(place)
        said = description.from_hub_config(hub_config, source=f"{place}/{CONFIG}")
        weights = _weights(source, tensors, said=said)
        path = f"{place}/{TOKENIZER}"
        tokenizer = read_json(path) if file_exists(path) else None
        return replace(weights, noise=hub_config.get("noise"), tokenizer=tokenizer)
    if place.endswith(".safetensors"):
        hub_config = read_safetensors_metadata(place, "config")
        said = hub_config and description.from_hub_config(hub_config, source=place)
        weights = _weights(source, read_safetensors(place), said=said)
        return replace(weights, tokenizer=read_safetensors_metadata(place, "tokenizer"))
    return _lightning_weights(source, read_checkpoint(place))


def _weights(source: str, tensors: Mapping[str, Any], *, said: dict[str, Any] | None) -> Weights:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{source}: {name!r} in it is no tensor but {type(tensor).__name__}")
    state_dict = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    hub_config = description.merged(said, description.from_tensors(state_dict), source=source)
    is_block_diffusion = hub_config["algo"] == "bd3lm"
    block_size = hub_config["block_size"] if is_block_diffusion else None
    return Weights(source, state_dict, block_size=block_size, hub_config=hub_config)


def _lightning_weights(source: str, checkpoint: Mapping[str, Any]) -> Weights:
    if not isinstance(checkpoint["state_dict"], Mapping):
        raise ValueError(f"{source}: not a Lightning checkpoint, its state_dict is no dictionary")
    parameters = checkpoint.get("hyper_parameters")
    found = parameters.get("config") if isinstance(parameters, Mapping) else None
    config = description.plain_config(found)
    weights = _weights(
        source,
        checkpoint["state_dict"],
        said=description.from_run_config(config, vocab_size=None) if config else None,
    )
    weights = replace(
        weights,
        run_config=config,
        noise=description.lookup(config, "noise.type"),
        tokenizer=description.plain_config(checkpoint.get("tokenizer")) or None,
    )
    if checkpoint.get("ema") is None:
        return weights
    ema = checkpoint["ema"]
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, list) or not all(isinstance(tensor, Tensor) for tensor in shadow):
        raise ValueError(f"{source}: its ema has no shadow_params that are a list of tensors")
    progress = {key: ema[key] for key in ("decay", "num_updates") if key in ema}
    return replace(weights, shadow_params=shadow, ema_progress=progress)
