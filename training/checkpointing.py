"""Weights from files: Lightning checkpoints, Hub-format directories, safetensors, Hub ids.

Nothing here runs code from a file: checkpoints are read as tensors and plain containers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from utils import file_exists, get_logger

logger = get_logger(__name__)

HUB_FILES = ("config.json", "model.safetensors")
# Buffers that a file may lack: they are derived from the sizes, or start from the config.
OPTIONAL_KEYS = ("sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq")


@dataclass(frozen=True)
class Weights:
    """Named tensors of a model, and the moving average where the file has one.

    Attributes:
        source: where they come from, for messages.
        state_dict: tensors under their checkpoint names (`backbone....`).
        shadow_params: the average, in the order of the parameters.
        block_size: L of block diffusion, where the file says so.
    """

    source: str
    state_dict: dict[str, Tensor]
    shadow_params: list[Tensor] | None = None
    block_size: int | None = None

    def without_clipped_range(self) -> "Weights":
        """The same without the clipped range, which fine-tuning takes from its config."""
        kept = {k: v for k, v in self.state_dict.items() if not k.startswith("sampling_eps_")}
        return replace(self, state_dict=kept)


def read_checkpoint(path: str) -> dict[str, Any]:
    """A Lightning checkpoint as a dictionary of tensors and plain containers.

    Args:
        path: a file, local or any place fsspec reaches.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, or holds pickled objects other than tensors.
    """
    if not file_exists(path):
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        with fsspec.open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle fail in every possible way
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({reason})") from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{path}: not a Lightning checkpoint, it has no 'state_dict'")
    return checkpoint


def read_weights(source: str) -> Weights:
    """Weights from a checkpoint, a .safetensors file, a Hub-format directory or a Hub id.

    Raises:
        FileNotFoundError: if there is no such file, directory or (without network) Hub download.
        ValueError: if a file is not what its name says.
    """
    if not file_exists(source) and _looks_like_hub_id(source):
        source = _download(source)
    if not file_exists(source):
        raise FileNotFoundError(f"{source}: there is no such checkpoint, directory or Hub id")
    fs, name = fsspec.core.url_to_fs(source)
    if fs.isdir(name):
        hub_config, tensors = _read_hub_directory(source)
        return Weights(source, tensors, block_size=hub_config.get("block_size"))
    if source.endswith(".safetensors"):
        return Weights(source, _read_safetensors(source))
    checkpoint = read_checkpoint(source)
    shadow = checkpoint["ema"]["shadow_params"] if "ema" in checkpoint else None
    return Weights(source, dict(checkpoint["state_dict"]), shadow, _block_size_of(checkpoint))


def _block_size_of(checkpoint: Mapping[str, Any]) -> int | None:
    """L in a checkpoint's configuration; only to block diffusion is it more than a length."""
    config = checkpoint.get("hyper_parameters", {}).get("config", {})
    is_block_diffusion = config.get("algo", {}).get("name") == "bd3lm"
    return config.get("block_size") if is_block_diffusion else None


def load_weights(model: nn.Module, weights: Weights, *, use_ema: bool) -> None:
    """Copy weights into a model, every one of them or none.

    `_orig_mod.` prefixes (of a compiled network) are dropped, and `OPTIONAL_KEYS` may be missing.

    Args:
        model: the module with the same names.
        weights: as `read_weights` returns them.
        use_ema: take the moving average where the file has one.

    Raises:
        ValueError: lists the keys and shapes that do not match; the model is unchanged.
    """
    loaded = {k.replace("_orig_mod.", ""): v for k, v in weights.state_dict.items()}
    own = model.state_dict()
    if use_ema and weights.shadow_params is not None:
        loaded |= _named_average(model, weights)
    problems = [f"missing {k}" for k in own if k not in loaded and k not in OPTIONAL_KEYS]
    problems += [f"unexpected {k}" for k in loaded if k not in own and k not in OPTIONAL_KEYS]
    problems += [
        f"{k} is {tuple(loaded[k].shape)} in the file, {tuple(own[k].shape)} in the model"
        for k in own
        if k in loaded and loaded[k].shape != own[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(
            f"{weights.source}: {len(problems)} weights do not fit this configuration: {shown}"
        )
    model.load_state_dict({k: v for k, v in loaded.items() if k in own}, strict=False)
    average = ", moving average" if use_ema and weights.shadow_params is not None else ""
    logger.info("Loaded %d tensors from %s%s", len(loaded), weights.source, average)


def _named_average(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(names) != len(weights.shadow_params):
        raise ValueError(
            f"{weights.source}: ema holds {len(weights.shadow_params)} tensors, the model has "
            f"{len(names)} parameters; eval.disable_ema=true ignores it"
        )
    return dict(zip(names, weights.shadow_params, strict=True))


def _read_hub_directory(directory: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors."""
    for name in HUB_FILES:
        if not file_exists(f"{directory}/{name}"):
            raise FileNotFoundError(f"{directory}: a Hub-format directory needs {name}")
    try:
        with fsspec.open(f"{directory}/config.json", "r", encoding="utf-8") as file:
            config = json.load(file)
            model_type = config.get("model_type")
    except ValueError as error:
        raise ValueError(f"{directory}/config.json: not a JSON file ({error})") from error
    if model_type not in ("bd3lm", "mdlm"):
        raise ValueError(
            f"{directory}/config.json: model_type={model_type!r}, allowed are bd3lm and mdlm"
        )
    return config, _read_safetensors(f"{directory}/model.safetensors")


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        with fsspec.open(path, "rb") as file:
            return safetensors.torch.load(file.read())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _download(hub_id: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    try:
        return snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id}: no such file here, and the Hub cannot be reached for it. Put its "
            f"{' and '.join(HUB_FILES)} into a directory and give that directory instead"
        ) from error
