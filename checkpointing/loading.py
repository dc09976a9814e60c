"""Weights into a model: all of them fit, or none is loaded; a report says which did."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from checkpointing.weights import Weights
from utils import get_logger

logger = get_logger(__name__)

# Buffers that a file may lack: they are derived from the sizes, or start from the config.
OPTIONAL_KEYS = ("sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq")
_MAX_LISTED = 20


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
