"""`generate` of the Hugging Face model: this project's samplers, asked as transformers' are."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from sampling.base import SamplerOutput
from sampling.generation import TextModel

from .generation_inputs import padded_as_prompts, prompt_canvas, read_prompts
from .generation_options import LENGTHS, asked_for, sampling_options

SAMPLERS = {"subs": "semi_ar", "sedd": "analytic", "ar": "ar"}


class SamplerGenerationMixin(GenerationMixin):
    """What `BD3LM` has in the place of transformers' decoding loops."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        inputs: Tensor | None = None,
        num_samples: int = 1,
        seed: int = 0,
        max_retries: int = 10,
        **options: Any,
    ) -> Tensor | SamplerOutput:
        """Sample with this model's sampler.

        Args:
            input_ids: prompts (B, P), or texts in which `config.mask_index` marks what is to be
                filled. BOS goes before them where they do not all begin with it. None: BOS.
            attention_mask: 0 before or behind a prompt that is shorter than others, (B, P).
            generation_config: of transformers, holding any of `options`.
            inputs: another name of `input_ids`.
            num_samples: rows where there is no prompt.
            seed: of all rows; a row does not depend on the others.
            max_retries: how often a row that degenerates is drawn again.
            options: fields of `SamplingOptions`, such as `nucleus_p`, `kv_cache`, `num_steps`;
                transformers' names of them (`asked_for`); and `max_length`, tokens with BOS and
                prompt, by default the model's length, or that of the prompts with
                `max_new_tokens`, tokens behind each prompt; `num_return_sequences` for each;
                `pad_token_id`, by default EOS; `return_dict_in_generate` for the whole
                `SamplerOutput` (lengths, passes and so on), in which padding is behind the texts.

        Returns:
            Tokens (B, N). Behind the end of a row there is padding, and before a prompt where the
            prompts had it, so that they all end in the same place.

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        self._check_known("parameterization", "mask_index", "bos_token_id", "eos_token_id")
        if getattr(self.prepare_inputs_for_generation, "__self__", self) is not self:
            raise ValueError("generate: PEFT's prompt tuning is not heeded; LoRA and the like are")
        config = self.config
        asked = asked_for(
            options, given=generation_config, stored=self.generation_config, config=config
        )
        form = {name: asked.pop(name, None) for name in LENGTHS}
        settings = sampling_options(asked, config=config)
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            input_ids = torch.full((num_samples, 1), config.bos_token_id)
            attention_mask = None
        for name, value in (
            ("num_samples", num_samples),
            ("num_return_sequences", form["num_return_sequences"]),
        ):
            if value is not None and value < 1:
                raise ValueError(f"generate({name}={value}): allowed are integers from 1")
        prompts = read_prompts(
            torch.as_tensor(input_ids, device=self.device),
            None if attention_mask is None else torch.as_tensor(attention_mask, device=self.device),
            config=config,
            copies=form["num_return_sequences"] or 1,
        )
        canvas, limits = prompt_canvas(
            prompts,
            config=config,
            max_length=form["max_length"],
            max_new_tokens=form["max_new_tokens"],
        )
        model = TextModel(
            denoiser=self.denoiser,
            sampler=SAMPLERS[config.parameterization],
            block_size=config.block_size,
            is_block_causal=self.is_block_diffusion,
            mask_index=config.mask_index,
            eos_index=config.eos_token_id,
            noise=self.noise,
        )
        was_training = self.training
        self.eval()
        try:
            with self._precision():
                output = model.generate(
                    canvas, options=settings, seed=seed, limits=limits, max_retries=max_retries
                )
        finally:
            self.train(was_training)
        if form["return_dict_in_generate"]:
            return output
        return padded_as_prompts(
            output.tokens,
            lengths=output.lengths,
            padding=prompts.padding,
            pad=config.eos_token_id if form["pad_token_id"] is None else form["pad_token_id"],
            width=int(limits.max()),
        )
