"""Weights from files into a model: all of them fit, or none is loaded; a report says which did.

Lightning checkpoints of the original or of this code, Hub-format directories, Hub ids, safetensors.
Nothing here runs code from a file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import fsspec
from torch import Tensor, nn

from training import description
from training.hub_directory import (
    CONFIG,
    download,
    looks_like_hub_id,
    read_hub_directory,
    read_safetensors,
    read_safetensors_config,
)
from training.torch_file import read_torch_file
from utils import file_exists, get_logger

logger = get_logger(__name__)

# Buffers that a file may lack: they are derived from the sizes, or start from the config.
OPTIONAL_KEYS = ("sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq")
_MAX_LISTED = 20


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
    """

    source: str
    state_dict: dict[str, Tensor]
    shadow_params: list[Tensor] | None = None
    block_size: int | None = None
    hub_config: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(description.KEYS))
    ema_progress: dict[str, float | int] = field(default_factory=dict)

    def without_clipped_range(self) -> "Weights":
        """The same without the clipped range, which fine-tuning takes from its config."""
        kept = {k: v for k, v in self.state_dict.items() if not k.startswith("sampling_eps_")}
        return replace(self, state_dict=kept)


@dataclass(frozen=True)
class LoadReport:
    """What became of each weight.

    Attributes:
        source: where they come from.
        matched: names that were loaded.
        missing: names of the model that the file lacks.
        unexpected: names of the file that the model lacks.
        reshaped: (name, shape in the file, shape in the model).
        is_average: whether the moving average was taken.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    is_average: bool

    def differing(self) -> set[str]:
        """Names that do not match."""
        return {*self.missing, *self.unexpected, *(name for name, _, _ in self.reshaped)}

    def optional(self) -> set[str]:
        """Names on one side only that need not be on both."""
        return {*self.missing, *self.unexpected} & set(OPTIONAL_KEYS)

    def __str__(self) -> str:
        average = " (moving average)" if self.is_average else ""
        return (
            f"{self.source}{average}: {len(self.matched)} weights matched, {len(self.missing)} "
            f"missing, {len(self.unexpected)} unexpected, {len(self.reshaped)} reshaped"
        )

    def lines(self, *, only: set[str] | None = None) -> list[str]:
        """One line for each name that does not match; `only`: of these."""
        lines = [(name, f"missing {name}") for name in self.missing]
        lines += [(name, f"unexpected {name}") for name in self.unexpected]
        lines += [
            (name, f"{name} is {found} in the file, {own} in the model")
            for name, found, own in self.reshaped
        ]
        return [line for name, line in lines if only is None or name in only]


# --- reading -------------------------------------------------------------------------------------


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
        return _weights(source, tensors, said=said)
    if place.endswith(".safetensors"):
        hub_config = read_safetensors_config(place)
        said = hub_config and description.from_hub_config(hub_config, source=place)
        return _weights(source, read_safetensors(place), said=said)
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
    config = None
    if isinstance(checkpoint.get("hyper_parameters"), Mapping):
        config = description.plain_config(checkpoint["hyper_parameters"].get("config"))
    said = None
    if isinstance(config, Mapping):
        said = description.from_run_config(config, vocab_size=None)
    weights = _weights(source, checkpoint["state_dict"], said=said)
    if checkpoint.get("ema") is None:
        return weights
    ema = checkpoint["ema"]
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, list) or not all(isinstance(tensor, Tensor) for tensor in shadow):
        raise ValueError(f"{source}: its ema has no shadow_params that are a list of tensors")
    progress = {key: ema[key] for key in ("decay", "num_updates") if key in ema}
    return replace(weights, shadow_params=shadow, ema_progress=progress)


# --- loading -------------------------------------------------------------------------------------


def load_weights(
    model: nn.Module, weights: Weights, *, use_ema: bool, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """Copy weights into a model, every one of them or none, and log the report.

    Args:
        model: the module with the same names.
        weights: as `read_weights` returns them. `OPTIONAL_KEYS` may be missing.
        use_ema: take the moving average where the file has one.
        allow_missing: names, or patterns such as `backbone.output_layer.*`, that may be missing,
            unexpected or of another shape; the model keeps what it has there.

    Raises:
        ValueError: lists the names that do not match, or hold what is no number; the model is
            unchanged.
    """
    taken, report = matching_weights(model, weights, use_ema=use_ema, allow_missing=allow_missing)
    model.load_state_dict(taken, strict=False)
    logger.info("%s", report)
    for line in report.lines(only=report.optional()):
        logger.info("%s: %s, as it may be", weights.source, line)
    for line in report.lines(only=report.differing() - report.optional()):
        logger.warning("%s: %s, as eval.allow_missing says", weights.source, line)
    return report


def matching_weights(
    model: nn.Module, weights: Weights, *, use_ema: bool, allow_missing: Sequence[str] = ()
) -> tuple[dict[str, Tensor], LoadReport]:
    """What `load_weights` would load, and its report; the model may be on the meta device."""
    loaded, is_average = dict(weights.state_dict), False
    if use_ema and weights.shadow_params is not None:
        loaded |= named_average(model, weights)
        is_average = True
    own = model.state_dict()
    report = _compare(loaded, own, source=weights.source, is_average=is_average)
    _refuse_unknown_patterns(allow_missing, names={*own, *loaded})
    allowed = {n for n in report.differing() if any(fnmatchcase(n, p) for p in allow_missing)}
    problems = report.lines(only=report.differing() - allowed - report.optional())
    if problems:
        shown = "; ".join(problems[:_MAX_LISTED]) + ("; ..." if problems[_MAX_LISTED:] else "")
        raise ValueError(
            f"{weights.source}: {len(problems)} weights do not fit this configuration: {shown}. "
            f"{report}; eval.allow_missing=[NAME,...] names what may differ"
        )
    taken = {name: loaded[name] for name in report.matched}
    refuse_non_numbers(taken, source=weights.source)
    return taken, report


def _compare(
    loaded: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str, is_average: bool
) -> LoadReport:
    both = [name for name in own if name in loaded]
    same = tuple(name for name in both if loaded[name].shape == own[name].shape)
    return LoadReport(
        source=source,
        matched=same,
        missing=tuple(name for name in own if name not in loaded),
        unexpected=tuple(name for name in loaded if name not in own),
        reshaped=tuple(
            (name, tuple(loaded[name].shape), tuple(own[name].shape))
            for name in both
            if loaded[name].shape != own[name].shape
        ),
        is_average=is_average,
    )


def _refuse_unknown_patterns(patterns: Iterable[str], *, names: set[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"eval.allow_missing=[{pattern}]: no weight of the file or of the model is called "
                "so; allowed are names such as backbone.output_layer.linear.weight and patterns "
                "such as backbone.output_layer.*"
            )


def refuse_non_numbers(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Raise a ValueError that names the tensors which hold NaN, infinities or no real numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} is of {tensor.dtype}, allowed are floating types")
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinite values")


def named_average(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The positional moving average under the names of the model's parameters.

    Raises:
        ValueError: if it has another number of tensors, or one of another shape, than the model.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(names) != len(weights.shadow_params):
        raise ValueError(
            f"{weights.source}: ema holds {len(weights.shadow_params)} tensors, the model has "
            f"{len(names)} parameters; eval.disable_ema=true ignores it"
        )
    average = dict(zip(names, weights.shadow_params, strict=True))
    for place, (name, tensor) in enumerate(average.items()):
        of_weights = weights.state_dict.get(name)
        if of_weights is not None and of_weights.shape != tensor.shape:
            raise ValueError(
                f"{weights.source}: ema.shadow_params[{place}] is {tuple(tensor.shape)}, but "
                f"{name}, which it should be the average of, is {tuple(of_weights.shape)}; "
                "eval.disable_ema=true ignores it"
            )
    return average
