"""What the section `sampling` asks for: how tokens are drawn, the rows to draw, where they go."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from configuration.training_request import lightning_precision, plain
from corpora import tokenization
from corpora.lines import without_surrogates
from sampling.options import SamplingOptions
from sampling.prompts import CanvasRow, gap_row, prompt_row, read_gap_texts, read_prompts


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """The section `sampling`, and what else samples and their files depend on.

    Attributes:
        options: how tokens are drawn.
        prompts, infill: files of given texts.
        max_new_tokens: behind a prompt or BOS; None: up to `length`.
        num_sample_batches: of blank rows; completions of each given text.
        batch_size: rows drawn at once (`loader.eval_batch_size`).
        length: tokens of a row (`model.length`).
        seed: of all rows.
        max_retries: how often a row that degenerates is drawn again.
        compile: passes over the KV cache have fixed shapes and are compiled; "graphs": the same
            uncompiled; on a GPU both are replayed as CUDA graphs.
        precision: Lightning's name of it.
        accelerator: of `trainer`.
        logdir: where samples go.
        trace: the page that replays them.
        live: show rows in the terminal.
        title: of that page.
        scorer: `eval.gen_ppl_eval_model_name_or_path`.
        scorer_batch_size: windows that it reads at once.
        checkpoint: `eval.checkpoint_path`.
        run_config: the whole configuration.
    """

    options: SamplingOptions
    prompts: str | None
    infill: str | None
    max_new_tokens: int | None
    num_sample_batches: int
    batch_size: int
    length: int
    seed: int
    max_retries: int
    compile: bool | str
    precision: str
    accelerator: str
    logdir: str
    trace: str | None
    live: bool
    title: str
    scorer: str | None
    scorer_batch_size: int
    checkpoint: str
    run_config: Mapping[str, Any]

    @property
    def is_bf16(self) -> bool:
        """Whether matrix products run in bf16."""
        return self.precision.startswith("bf16")

    def given_texts(self) -> list[str]:
        """What `sampling.prompts` or `sampling.infill` holds; nothing without either.

        Raises:
            ValueError, OSError: as `read_prompts` does.
        """
        if self.prompts is not None:
            return read_prompts(self.prompts)
        return [] if self.infill is None else read_gap_texts(self.infill)

    def canvas_rows(
        self, tokenizer: PreTrainedTokenizerBase, *, mask_index: int
    ) -> list[CanvasRow]:
        """The rows to sample: blank ones, or those of `sampling.prompts` or `sampling.infill`.

        Each prompt and each text with gaps is completed `num_sample_batches` times.
        """
        bos_index, limit = tokenizer.bos_token_id, self.max_new_tokens

        def encode(text: str) -> list[int]:
            return tokenization.encode(tokenizer, [text])[0]

        shared = {"encode": encode, "bos_index": bos_index, "mask_index": mask_index,
                  "length": self.length}  # fmt: skip
        texts = self.given_texts()
        if self.prompts is not None:
            rows = [prompt_row(text, max_new_tokens=limit, **shared) for text in texts]
        elif self.infill is not None:
            rows = [gap_row(text, **shared) for text in texts]
        else:
            end = self.length if limit is None else min(1 + limit, self.length)
            rows = [CanvasRow(tokens=[bos_index], limit=end, source="")] * self.batch_size
        return rows * self.num_sample_batches


def sampling_request(config: DictConfig) -> SamplingRequest:
    """The request of a composed configuration.

    Raises:
        ValueError: names the key, its value and what is allowed.
    """
    sampling, scoring = config.sampling, config.eval
    shared = {field.name for field in dataclasses.fields(SamplingRequest)} & set(sampling.keys())
    return SamplingRequest(
        options=sampling_options(config),
        batch_size=config.loader.eval_batch_size,
        length=config.model.length,
        seed=config.seed,
        precision=lightning_precision(config.trainer.precision),
        accelerator=config.trainer.accelerator,
        title=f"{config.algo.name}, block size {config.block_size}",
        scorer=scoring.gen_ppl_eval_model_name_or_path,
        scorer_batch_size=scoring.perplexity_batch_size,
        checkpoint=scoring.checkpoint_path,
        run_config=plain(config),
        **{name: sampling[name] for name in shared},
    )


def sampling_options(config: DictConfig) -> SamplingOptions:
    """The keys under `sampling` and `algo.T` as the samplers take them.

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
        options["stop_strings"] = tuple(
            without_surrogates(text) if isinstance(text, str) else text
            for text in sampling.stop_strings
        )
    return SamplingOptions(**options, num_steps=config.algo.T)
