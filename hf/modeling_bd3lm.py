"""The network and its samplers as a model of Hugging Face transformers."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.masks import AttentionPattern
from noise_schedule import get_noise
from sampling.base import SamplerOutput
from sampling.generation import TextModel

from .configuration_bd3lm import BD3LMConfig
from .export import write_sources
from .generation_inputs import prompt_canvas, sampling_options
from .initialization import initialise
from .nelbo import nelbo

SAMPLERS = {"subs": "semi_ar", "sedd": "analytic", "ar": "ar"}
# Arguments of `push_to_hub`, which `save_pretrained(push_to_hub=True)` takes too.
HUB_ARGUMENTS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision",
    "create_pr", "tags",
)  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_bd3lm.BD3LMConfig",
    "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
}


class BD3LM(PreTrainedModel, GenerationMixin):
    """AR, MDLM, SEDD and block diffusion language models.

        model = AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True)
        tokens = model.generate(num_samples=4, nucleus_p=0.9, kv_cache=True)

    `backbone` is the very network of the Lightning module, under the same names.
    """

    config: BD3LMConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _no_split_modules = ["DITBlock"]
    # Angles and the range of t have more digits than half precision.
    _keep_in_fp32_modules_strict = ["rotary_emb", "sampling_eps_min", "sampling_eps_max"]
    # The range of t is no part of every published file.
    _keys_to_ignore_on_load_missing = ["sampling_eps_"]
    _keys_to_ignore_on_load_unexpected = ["sampling_eps_"]

    def __init__(self, config: BD3LMConfig):
        super().__init__(config)
        if config.parameterization not in (None, *SAMPLERS):
            raise ValueError(
                f"parameterization={config.parameterization}: allowed are {', '.join(SAMPLERS)}"
            )
        self.noise = get_noise(config.noise)
        # Published files ask for FlexAttention, which has no backward pass on CPUs; `auto` takes it
        # wherever it pays.
        backend = "auto" if config.attn_backend == "flex" else config.attn_backend
        self.backbone = DIT(
            DITConfig(
                vocab_size=config.vocab_size,
                block_size=config.block_size,
                hidden_size=config.hidden_dim,
                cond_dim=config.cond_dim,
                n_blocks=config.n_blocks,
                n_heads=config.n_heads,
                dropout=config.dropout,
                adaln=config.adaln,
                attn_backend=backend,
            )
        )
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(float(config.sampling_eps_min)))
            self.register_buffer("sampling_eps_max", torch.tensor(float(config.sampling_eps_max)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, model=self)

    @property
    def is_block_diffusion(self) -> bool:
        return self.config.cross_attn and self.config.parameterization != "ar"

    @property
    def denoiser(self) -> Denoiser:
        """The network and the way its logits are read, as losses and samplers take it."""
        config = self.config
        return Denoiser(
            backbone=self.backbone,
            parameterization=config.parameterization,
            mask_index=config.mask_index,
            time_conditioning=config.time_conditioning,
        )

    def _precision(self) -> AbstractContextManager:
        """Weights in half precision meet activations in float32, behind norms: autocast casts."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, dtype=self.dtype)
        return nullcontext()

    def _check_known(self, *names: str) -> None:
        for name in names:
            if getattr(self.config, name) is None:
                raise ValueError(
                    f"{name}: config.json of this model does not say it; set model.config.{name} "
                    "to what the model was trained with"
                )

    # --- logits and losses -----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        sample_mode: bool | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        seed: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits, and with labels the NELBO.

        Args:
            input_ids: tokens (B, T), int64. A model with `cross_attn` reads [x_t ; x_0], T = 2N,
                and predicts the N tokens of x_t, unless `sample_mode`.
            timesteps: noise level sigma of each row, (B,), which only a model with
                `time_conditioning` is told; None means 0.
            sample_mode: with `cross_attn`, read one text under the block-causal mask. By default
                where there are labels.
            attention_mask: 0 where a token carries no loss, (B, N). Attention does not heed it: the
                models are trained on rows without padding.
            labels: clean tokens (B, N), -100 where a token carries no loss. The loss is the NELBO
                per token in nats of one draw of t and x_t; of ar, the exact NLL.
            seed: of that draw; by default torch's own stream goes on (`torch.manual_seed`).
            output_hidden_states: also what goes into the first block and comes out of each.
            return_dict: a `MaskedLMOutput` or a tuple; by default as the config says.

        Returns:
            loss (), logits (B, T, V) with `cross_attn` and without `sample_mode` (B, N, V), and
            hidden states, n_blocks + 1 times (B, T, D).
        """
        if sample_mode is None:
            sample_mode = labels is not None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        loss = None
        if labels is not None:
            loss = self._nelbo(input_ids, labels, attention_mask=attention_mask, seed=seed)
        hidden_states: list[Tensor] = []
        is_recorded = torch.is_grad_enabled() and labels is None  # the loss has its own passes
        with torch.set_grad_enabled(is_recorded), self._precision():
            logits = self._logits(
                input_ids,
                timesteps,
                sample_mode=sample_mode,
                hidden_states=hidden_states if output_hidden_states else None,
            )
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=tuple(hidden_states) or None
        )
        return output if return_dict else output.to_tuple()

    def _logits(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None,
        *,
        sample_mode: bool,
        hidden_states: list[Tensor] | None,
    ) -> Tensor:
        """The network's logits; what its blocks exchange is appended to `hidden_states`."""
        pattern = self._pattern(AttentionPattern.BLOCK_CAUSAL if sample_mode else None)
        if pattern is AttentionPattern.BLOCK_DIFFUSION and input_ids.shape[1] % 2:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens: this model reads [x_t ; x_0], an even "
                "number of them; sample_mode=True reads one text"
            )
        hooks = []
        if hidden_states is not None:
            modules = [self.backbone.vocab_embed, *self.backbone.blocks]
            hooks = [
                module.register_forward_hook(lambda _module, _inputs, x: hidden_states.append(x))
                for module in modules
            ]
        try:
            return self.denoiser.logits(input_ids, timesteps, pattern=pattern)
        finally:
            for hook in hooks:
                hook.remove()

    def _pattern(self, of_block_diffusion: AttentionPattern | None = None) -> AttentionPattern:
        """Who sees whom in training; block diffusion may be asked for another pattern."""
        if self.config.parameterization == "ar":
            return AttentionPattern.CAUSAL
        if not self.is_block_diffusion:
            return AttentionPattern.FULL
        return of_block_diffusion or AttentionPattern.BLOCK_DIFFUSION

    def _nelbo(
        self, input_ids: Tensor, labels: Tensor, *, attention_mask: Tensor | None, seed: int | None
    ) -> Tensor:
        self._check_known("parameterization", "mask_index")
        with self._precision():
            return nelbo(
                self.denoiser,
                input_ids,
                labels,
                attention_mask=attention_mask,
                noise=self.noise,
                block_size=self.config.block_size,
                pattern=self._pattern(),
                seed=seed,
            )

    # --- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        num_samples: int = 1,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        max_retries: int = 10,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Tensor | SamplerOutput:
        """Sample with this model's sampler.

        Args:
            input_ids: prompts (B, P), or texts in which `config.mask_index` marks what is to be
                filled. BOS goes before them where they do not all begin with it. None: BOS.
            attention_mask: 0 behind the end of a prompt that is shorter than others, (B, P).
            num_samples: rows where there is no prompt.
            max_length: tokens with BOS and prompt; by default the model's length, or that of the
                prompts with `max_new_tokens`.
            max_new_tokens: tokens behind each prompt; by default up to `max_length`.
            seed: of all rows; a row does not depend on the others.
            max_retries: how often a row that degenerates is drawn again.
            return_dict_in_generate: return the whole `SamplerOutput` (lengths, passes and so on).
            options: fields of `SamplingOptions`, such as `nucleus_p`, `kv_cache`, `num_steps`.

        Returns:
            Tokens (B, N); behind the end of a row there is EOS.

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        self._check_known("parameterization", "mask_index", "bos_token_id", "eos_token_id")
        config = self.config
        settings = sampling_options(options, config=config)
        if input_ids is None:
            input_ids = torch.full((num_samples, 1), config.bos_token_id)
        canvas, limits = prompt_canvas(
            input_ids.to(self.device),
            None if attention_mask is None else attention_mask.to(self.device),
            config=config,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
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
        return output if return_dict_in_generate else output.tokens[:, : int(limits.max())]

    # --- files -----------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers; the directory also holds the code that loads it without this project.

        `AutoModelForMaskedLM.from_pretrained(save_directory, trust_remote_code=True)` needs torch
        and transformers alone.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        is_pushed = kwargs.pop("push_to_hub", False)
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            write_sources(save_directory)
            if is_pushed:
                hub.setdefault("repo_id", Path(save_directory).name)
                self.push_to_hub(**hub)
