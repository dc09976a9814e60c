"""What the section `sampling` asks for: how tokens are drawn, and the rows to draw."""

import dataclasses

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from sampling.options import SMALL_VOCABULARY, SamplingOptions
from sampling.prompts import CanvasRow, gap_row, prompt_row, read_gap_texts, read_prompts
from sampling.stopping import Decode
from utils import get_logger

logger = get_logger(__name__)


def sampling_options(config: DictConfig, *, decode: Decode | None = None) -> SamplingOptions:
    """The keys under `sampling` and `algo.T` as the samplers take them.

    Args:
        config: the composed configuration.
        decode: the text of a list of tokens, for `sampling.stop_strings`.

    Raises:
        ValueError: names the key, its value and what is allowed.
    """
    sampling = config.sampling
    has_use = sampling.infill is not None and config.algo.sampler != "analytic"
    if sampling.infill_particles not in (None, 1) and not has_use:
        raise ValueError(
            f"sampling.infill_particles={sampling.infill_particles}: allowed without "
            "sampling.infill, and with algo.sampler=analytic, is null"
        )
    names = {field.name for field in dataclasses.fields(SamplingOptions)} - {"num_steps", "decode"}
    options = {name: sampling[name] for name in names}
    if OmegaConf.is_list(sampling.stop_strings):
        options["stop_strings"] = tuple(sampling.stop_strings)
    return SamplingOptions(**options, num_steps=config.algo.T, decode=decode)


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
    return dataclasses.replace(options, min_entropy=None)


def given_texts(config: DictConfig) -> list[str]:
    """What `sampling.prompts` or `sampling.infill` holds; nothing without either.

    Raises:
        ValueError, OSError: as `read_prompts` does.
    """
    if config.sampling.prompts is not None:
        return read_prompts(config.sampling.prompts)
    return [] if config.sampling.infill is None else read_gap_texts(config.sampling.infill)


def canvas_rows(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, *, mask_index: int
) -> list[CanvasRow]:
    """The rows to sample: blank ones, or those of `sampling.prompts` or `sampling.infill`.

    Each prompt and each text with gaps is completed `sampling.num_sample_batches` times.
    """
    sampling, length = config.sampling, config.model.length
    bos_index, limit = tokenizer.bos_token_id, sampling.max_new_tokens
    repeats = sampling.num_sample_batches

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    shared = {"encode": encode, "bos_index": bos_index, "mask_index": mask_index, "length": length}
    texts = given_texts(config)
    if sampling.prompts is not None:
        return [prompt_row(t, max_new_tokens=limit, **shared) for t in texts] * repeats
    if sampling.infill is not None:
        return [gap_row(t, **shared) for t in texts] * repeats
    end = length if limit is None else 1 + limit
    blank = CanvasRow(tokens=[bos_index], limit=min(end, length), source="")
    return [blank] * (repeats * config.loader.eval_batch_size)
