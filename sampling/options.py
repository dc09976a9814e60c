"""All that a user may ask of a sampler, and the sampler that does it."""

import math
from dataclasses import dataclass

from models.masks import AttentionPattern
from noise_schedule import Noise

from .analytic import AnalyticSampler
from .ar import AutoregressiveSampler
from .base import Sampler
from .decoding import NUCLEUS_RULES, Decoding
from .semi_ar import SemiAutoregressiveSampler
from .stopping import StopRule

# Below this many symbols ordinary text has less entropy than the paper's bound of 4 nats, which is
# meant for GPT-2's 50,257.
SMALL_VOCABULARY = 512


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The keys under `sampling`; the defaults are the paper's procedure.

    Attributes:
        first_hitting: one token per pass (bd3lm, mdlm); otherwise `num_steps` steps per block.
        num_steps: T of the ancestral and the analytic sampler (`algo.T`).
        kv_cache: keep keys and values of finished blocks (bd3lm, ar).
        nucleus_p, nucleus_rule, temperature, top_k: see `decoding.Decoding`.
        tokens_per_step: masks revealed per first-hitting pass.
        confidence_threshold: reveal what is at least this probable instead; None does not.
        var_length: a row ends at EOS, or where it degenerates.
        stop_on_eos: a row ends at EOS.
        min_entropy: nats in 256 tokens below which a row has degenerated; None never.
    """

    first_hitting: bool = True
    num_steps: int = 0
    kv_cache: bool = False
    nucleus_p: float = 1.0
    nucleus_rule: str = "paper"
    temperature: float = 1.0
    top_k: int | None = None
    tokens_per_step: int = 1
    confidence_threshold: float | None = None
    var_length: bool = False
    stop_on_eos: bool = False
    min_entropy: float | None = 4.0

    def __post_init__(self):
        """Raises ValueError: names the key, its value and what is allowed."""
        checks = (
            ("nucleus_p", 0 < self.nucleus_p <= 1, "a number in (0, 1]"),
            ("nucleus_rule", self.nucleus_rule in NUCLEUS_RULES, " and ".join(NUCLEUS_RULES)),
            ("temperature", 0 <= self.temperature < math.inf, "a number in [0, inf)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "null and an integer in [1, inf)"),
            ("tokens_per_step", self.tokens_per_step >= 1, "an integer in [1, inf)"),
            (
                "confidence_threshold",
                self.confidence_threshold is None or 0 < self.confidence_threshold <= 1,
                "null and a number in (0, 1]",
            ),
            (
                "min_entropy",
                self.min_entropy is None or self.min_entropy >= 0,
                "null and a number in [0, inf)",
            ),
        )
        for name, is_valid, allowed in checks:
            if not is_valid:
                raise ValueError(f"sampling.{name}={getattr(self, name)}: allowed is {allowed}")

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            temperature=self.temperature,
            top_k=self.top_k,
            nucleus_p=self.nucleus_p,
            nucleus_rule=self.nucleus_rule,
        )

    def stop_rule(self, *, eos_index: int) -> StopRule:
        ends_at_eos = self.var_length or self.stop_on_eos
        return StopRule(
            eos_index=eos_index if ends_at_eos else None,
            min_entropy=self.min_entropy,
            is_var_length=self.var_length,
        )


def make_sampler(
    name: str,
    options: SamplingOptions,
    *,
    block_size: int,
    is_block_causal: bool,
    mask_index: int,
    eos_index: int,
    noise: Noise,
) -> Sampler:
    """The sampler called `name` (config key algo.sampler).

    Args:
        name: ar, semi_ar or analytic.
        options: what the user asks for.
        block_size: L; for mdlm the context.
        is_block_causal: bd3lm rather than mdlm.
        mask_index, eos_index: ids; EOS also pads rows that stopped.
        noise: the schedule, for the analytic sampler.

    Raises:
        ValueError: if there is none of that name.
    """
    shared = {
        "mask_index": mask_index,
        "pad_index": eos_index,
        "decoding": options.decoding,
        "stop": options.stop_rule(eos_index=eos_index),
    }
    if name == "ar":
        return AutoregressiveSampler(use_cache=options.kv_cache, **shared)
    if name == "analytic":
        return AnalyticSampler(noise=noise, num_steps=options.num_steps, **shared)
    if name != "semi_ar":
        raise ValueError(f"algo.sampler={name}: allowed are ar, semi_ar and analytic")
    return SemiAutoregressiveSampler(
        block_size=block_size,
        pattern=AttentionPattern.BLOCK_CAUSAL if is_block_causal else AttentionPattern.FULL,
        num_steps=None if options.first_hitting else options.num_steps,
        tokens_per_step=options.tokens_per_step,
        confidence_threshold=options.confidence_threshold,
        use_cache=options.kv_cache,
        **shared,
    )
