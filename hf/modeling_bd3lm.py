"""The network and its samplers as a model of Hugging Face transformers."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from likelihood.scoring import token_log_likelihood
from losses.token_losses import TokenLosses
from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.masks import AttentionPattern
from noise_schedule import get_noise

from .configuration_bd3lm import BD3LMConfig
from .export import write_sources
from .generation import SAMPLERS, SamplerGenerationMixin
from .initialization import initialise
from .layer_access import LayerAccess
from .nelbo import nelbo

# Arguments of `push_to_hub`, which `save_pretrained(push_to_hub=True)` takes too.
HUB_ARGUMENTS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision",
    "create_pr", "tags",
)  # fmt: skip
# Arguments that callers of any model give, and that change nothing here.
IGNORED = ("token_type_ids", "num_items_in_batch", "use_cache")


def auto_map(config: BD3LMConfig) -> dict[str, str]:
    """Which of transformers' Auto classes load the model; the last where it writes on and on."""
    is_causal = config.parameterization == "ar" or (
        config.parameterization == "subs" and config.cross_attn
    )
    models = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")[: 2 + is_causal]
    named = {name: "modeling_bd3lm.BD3LM" for name in models}
    return {"AutoConfig": "configuration_bd3lm.BD3LMConfig", **named}


class BD3LM(LayerAccess, SamplerGenerationMixin, PreTrainedModel):
    """AR, MDLM, SEDD and block diffusion language models.

        model = AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True)
        tokens = model.generate(num_samples=4, nucleus_p=0.9, kv_cache=True)

    `backbone` is the very network of the Lightning module, under the same names.
    """

    config: BD3LMConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _no_split_modules = ["DITBlock"]
    supports_gradient_checkpointing = True
    # The loss is a mean over the tokens of a batch, as trainers expect that accumulate gradients.
    accepts_loss_kwargs = False
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BD3LM":
        """As in torch, but `half()` and the like leave the range of t its digits."""
        kept = {k: v for k, v in self._buffers.items() if k.startswith("sampling_eps")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if self._buffers[name].dtype.itemsize < value.dtype.itemsize:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

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

    @property
    def losses(self) -> TokenLosses:
        """Its losses per token, of fresh noise; estimators of likelihoods take it."""
        return TokenLosses(
            denoiser=self.denoiser,
            noise=self.noise,
            pattern=self._pattern(),
            block_size=self.config.block_size,
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
        **others: Any,
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
            others: what transformers and PEFT give every model; None, False, and what is of no
                consequence here (`IGNORED`).

        Returns:
            loss (), logits (B, T, V) with `cross_attn` and without `sample_mode` (B, N, V), and
            hidden states, n_blocks + 1 times (B, T, D).

        Raises:
            ValueError: an argument that this model cannot heed, or rows that do not fit.
        """
        for name, value in others.items():
            if name not in IGNORED and value is not None and value is not False:
                raise ValueError(
                    f"forward({name}=...): this model has none; allowed are input_ids, timesteps, "
                    "sample_mode, attention_mask, labels, seed, output_hidden_states, return_dict"
                )
        if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)} and {input_ids.dtype}: allowed are "
                "ids (B, T), at least one"
            )
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
            sigma = timesteps if self.config.time_conditioning else None
            return self.backbone(input_ids, sigma, pattern=pattern)
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
                self.losses, input_ids, labels, attention_mask=attention_mask, seed=seed
            )

    def token_log_likelihood(self, tokens: Tensor, **how: Any) -> Tensor:
        """log p of texts in nats per block, see `likelihood.scoring.token_log_likelihood`.

            log_p = model.token_log_likelihood(tokens, estimator="left_to_right").sum(dim=1)
        """
        self._check_known("parameterization", "mask_index")
        with self._precision():
            return token_log_likelihood(self, tokens, **how)

    # --- files -----------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers; the directory also holds the code that loads it without this project.

        `AutoModelForMaskedLM.from_pretrained(save_directory, trust_remote_code=True)` needs torch
        and transformers alone.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        is_pushed = kwargs.pop("push_to_hub", False)
        self.config.auto_map = auto_map(self.config)
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            write_sources(save_directory)
            if is_pushed:
                hub.setdefault("repo_id", Path(save_directory).name)
                self.push_to_hub(**hub)
