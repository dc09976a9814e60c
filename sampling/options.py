"""All that a user may ask of a sampler, and the sampler that does it."""

import math
from dataclasses import dataclass, replace

from models.masks import AttentionPattern
from noise_schedule import Noise
from utils import get_logger

from .analytic import AnalyticSampler
from .ar import AutoregressiveSampler
from .base import Sampler
from .decoding import NUCLEUS_RULES, Decoding
from .particles import ParticleSampler
from .semi_ar import SemiAutoregressiveSampler
from .stopping import Decode, StopRule

logger = get_logger(__name__)

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
        stop_strings: a row ends with the token that completes one of these texts.
        decode: the text of a list of tokens, which `stop_strings` needs.
        min_entropy: nats in 256 tokens below which a row has degenerated; None never.
        infill_particles: K, how many texts are tried for each row, so that its gaps suit the given
            tokens further right; None or 1 lets the network see those of the same block alone.
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
    stop_strings: tuple[str, ...] = ()
    decode: Decode | None = None
    min_entropy: float | None = 4.0
    infill_particles: int | None = None

    def __post_init__(self):
        """Raises ValueError: names the key, its value and what is allowed."""
        threshold = self.confidence_threshold
        checks = (
            ("nucleus_p", _is_share(self.nucleus_p), "a number in (0, 1]"),
            ("nucleus_rule", self.nucleus_rule in NUCLEUS_RULES, " and ".join(NUCLEUS_RULES)),
            ("temperature", _is_size(self.temperature), "a number in [0, inf)"),
            (
                "top_k",
                self.top_k is None or _is_count(self.top_k),
                "null and an integer in [1, inf)",
            ),
            ("tokens_per_step", _is_count(self.tokens_per_step), "an integer in [1, inf)"),
            (
                "confidence_threshold",
                threshold is None or _is_share(threshold),
                "null and a number in (0, 1]",
            ),
            (
                "min_entropy",
                self.min_entropy is None or _is_size(self.min_entropy),
                "null and a number in [0, inf)",
            ),
            (
                "stop_strings",
                isinstance(self.stop_strings, (list, tuple))
                and all(isinstance(s, str) and s for s in self.stop_strings),
                "a list of texts that are not empty",
            ),
            *self._particle_checks(),
        )
        for name, is_valid, allowed in checks:
            if not is_valid:
                raise ValueError(f"sampling.{name}={getattr(self, name)}: allowed is {allowed}")

    def _particle_checks(self) -> tuple[tuple[str, bool, str], ...]:
        particles = self.infill_particles
        is_count = particles is None or _is_count(particles)
        return (
            ("infill_particles", is_count, "null and an integer in [1, inf)"),
            (
                "infill_particles",
                not self.uses_particles or self.confidence_threshold is None,
                "null and 1 where sampling.confidence_threshold is a number: the order of the "
                "positions must not depend on their tokens",
            ),
        )

    @property
    def uses_particles(self) -> bool:
        return self.infill_particles not in (None, 1)

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
            stop_strings=self.stop_strings,
            decode=self.decode,
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_share(value: object) -> bool:
    return _is_size(value) and 0 < value <= 1


def suit_vocabulary(options: SamplingOptions, *, vocab_size: int) -> SamplingOptions:
    """The options without the entropy rule where the vocabulary is too small for it."""
    if options.min_entropy is None or vocab_size >= SMALL_VOCABULARY:
        return options
    logger.warning(
        "sampling.min_entropy=%s is off: it is made for large vocabularies, and ordinary text of "
        "%d symbols may have less entropy; sampling.min_entropy=null says so without a warning",
        options.min_entropy,
        vocab_size,
    )
    return replace(options, min_entropy=None)


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
    """The sampler called `name` (config key algo.sampler), with particles where asked for.

    Args:
        name: ar, semi_ar or analytic.
        options: what the user asks for.
        block_size: L; for mdlm the context.
        is_block_causal: bd3lm rather than mdlm.
        mask_index, eos_index: ids; EOS also pads rows that stopped.
        noise: the schedule, for the analytic sampler.

    Raises:
        ValueError: if there is none of that name, or it cannot do what is asked for.
    """
    _check_cache_and_steps(name, options, is_block_causal=is_block_causal)
    shared = {
        "mask_index": mask_index,
        "pad_index": eos_index,
        "decoding": options.decoding,
        "stop": options.stop_rule(eos_index=eos_index),
    }
    if name == "ar":
        sampler = AutoregressiveSampler(use_cache=options.kv_cache, **shared)
    elif name == "analytic":
        sampler = AnalyticSampler(noise=noise, num_steps=options.num_steps, **shared)
    elif name == "semi_ar":
        sampler = SemiAutoregressiveSampler(
            block_size=block_size,
            pattern=AttentionPattern.BLOCK_CAUSAL if is_block_causal else AttentionPattern.FULL,
            num_steps=None if options.first_hitting else options.num_steps,
            tokens_per_step=options.tokens_per_step,
            confidence_threshold=options.confidence_threshold,
            use_cache=options.kv_cache,
            **shared,
        )
    else:
        raise ValueError(f"algo.sampler={name}: allowed are ar, semi_ar and analytic")
    return _with_particles(sampler, options) if options.uses_particles else sampler


def _check_cache_and_steps(name: str, options: SamplingOptions, *, is_block_causal: bool) -> None:
    """Raises ValueError: a cache whose keys would change, or a time grid without steps."""
    is_cached = name == "ar" or (name == "semi_ar" and is_block_causal)
    if options.kv_cache and not is_cached:
        raise ValueError(
            "sampling.kv_cache=True: allowed is False without causal attention, where later "
            "tokens change keys and values"
        )
    is_ancestral = not options.first_hitting and options.confidence_threshold is None
    is_on_grid = name == "analytic" or (name == "semi_ar" and is_ancestral)
    if is_on_grid and not _is_count(options.num_steps):
        raise ValueError(
            f"algo.T={options.num_steps} (num_steps): allowed with algo.sampler={name} and "
            f"sampling.first_hitting={options.first_hitting} is an integer in [1, inf)"
        )


def _with_particles(sampler: Sampler, options: SamplingOptions) -> ParticleSampler:
    if isinstance(sampler, AnalyticSampler):
        raise ValueError(
            f"sampling.infill_particles={options.infill_particles}: allowed with "
            "algo.sampler=analytic is null; its network sees the whole text anyway"
        )
    return ParticleSampler(inner=sampler, num_particles=options.infill_particles)
