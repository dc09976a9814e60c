"""The keys that exist and do nothing."""

from typing import Any

from omegaconf import DictConfig

from configuration.single_keys import value_of

# The original accepts these without reading them. They stay so that its commands keep working.
IGNORED_KEYS: dict[str, Any] = {
    "diffusion": "absorbing_state",
    "training.coeff_clip": -1.0,
    "sampling.noise_removal": False,
    "model.scale_by_sigma": True,
    "model.tie_word_embeddings": True,
    "noise.sigma_min": 1e-4,
    "noise.sigma_max": 20,
    "algo.dropout": 0.0,
    "algo.causal_attention": False,  # True in algo=ar
    "eval.generate_samples": False,
    "eval.compute_perplexity_on_sanity": False,
}


def ignored_key_warnings(config: DictConfig) -> list[str]:
    """Returns one sentence for each key the user changed although it does nothing."""
    defaults = IGNORED_KEYS | {"algo.causal_attention": config["algo"]["name"] == "ar"}
    return [
        f"{key}={value_of(config, key)} has no effect: the key is accepted for compatibility "
        f"(default {default})"
        for key, default in defaults.items()
        if value_of(config, key) != default
    ]
