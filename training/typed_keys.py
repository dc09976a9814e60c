"""Which keys were typed on the command line; all others are as the YAML files say."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

# Hydra writes there what was typed. A process that Lightning starts is given the configuration that
# came of it, in place of the command line.
_WRITTEN = Path(".hydra", "overrides.yaml")


def typed_keys() -> frozenset[str]:
    """`optim.lr` for `optim.lr=0.5`, `lr_scheduler` for `lr_scheduler=constant`.

    None where Hydra does not run, as where a program composes the configuration.
    """
    if not HydraConfig.initialized():
        return frozenset()
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().output_subdir is None and _WRITTEN.exists():
        lines = _WRITTEN.read_text(encoding="utf-8").split("\n")
        overrides += [line.removeprefix("- ") for line in lines]
    return frozenset(text.lstrip("'\"+~").partition("=")[0].partition("@")[0] for text in overrides)
