"""Refusing a run that cannot work, right after Hydra has composed and before anything is loaded."""

from omegaconf import DictConfig

from configuration import combinations, single_keys


def validate(config: DictConfig) -> None:
    """Checks every rule.

    Args:
        config: the composed configuration.

    Raises:
        ValueError: the first problem, as `key=value: what is allowed`.
    """
    for rule in (*single_keys.RULES, *combinations.RULES):
        for key, allowed in rule(config):
            raise ValueError(f"{key}={single_keys.value_of(config, key)}: {allowed}")
