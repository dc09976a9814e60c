"""The step of the original, written plainly from its description: what the others are measured by.

It computes the same losses from the same weights and the same noise, and spends what the original
spends on them: a dense (2N)^2 mask, the whole network and the output head at all 2N positions,
float32 logits and log probabilities of every token, optimizer and moving average tensor by tensor,
nothing compiled. Where the original's cost is in doubt it is the cheaper guess: modulations are
computed once per row, and in autocast the head's products follow it, only its results are float32.
"""

import math

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusion import Diffusion
from losses.forward_process import ClipInterval, noise_values, q_xt, sample_t
from models.dit import DITConfig, SigmaEmbedder
from models.masks import AttentionPattern
from noise_schedule import NoiseValues

MINUS_INFINITY = -1e6


def dense_block_diffusion_mask(*, length: int, block_size: int, device: torch.device) -> Tensor:
    """Who sees whom in [x_t ; x_0], (2N, 2N), True where query i sees key j."""
    index = torch.arange(2 * length, device=device)
    is_noisy, block = index < length, index % length // block_size
    i_noisy, j_noisy = is_noisy[:, None], is_noisy[None, :]
    i_block, j_block = block[:, None], block[None, :]
    own = (i_block == j_block) & (i_noisy == j_noisy)
    earlier = i_noisy & ~j_noisy & (i_block > j_block)
    clean = ~i_noisy & ~j_noisy & (i_block >= j_block)
    return own | earlier | clean


def rotary_table(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, d) of positions (T,)."""
    angles = torch.outer(positions.float(), inv_freq)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half form, of (B, H, T, d)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class ReferenceBlock(nn.Module):
    """One layer; parameters are named as in `models.dit.DITBlock`."""

    def __init__(self, config: DITConfig):
        super().__init__()
        dim = config.hidden_size
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.norm1 = nn.LayerNorm(dim, bias=False)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        if config.adaln:
            self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * dim)

    def forward(
        self,
        x: Tensor,
        *,
        condition: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); condition (B, C), mask (T, T)."""
        if condition is None:
            x = x + self._drop(self._attention(self.norm1(x), rotary, mask, is_causal))
            return x + self._drop(self.mlp(self.norm2(x)))
        parts = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift, scale, gate = parts[:3]
        h = self._attention(self.norm1(x) * (1 + scale) + shift, rotary, mask, is_causal)
        x = x + gate * self._drop(h)
        shift, scale, gate = parts[3:]
        return x + gate * self._drop(self.mlp(self.norm2(x) * (1 + scale) + shift))

    def _attention(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        qkv = self.attn_qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, d)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(dim=2))  # each (B, H, T, d)
        cos, sin = rotary
        q, k = rotated(q, cos=cos, sin=sin), rotated(k, cos=cos, sin=sin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.attn_out(out.transpose(1, 2).flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, p=self.dropout, training=self.training)


class ReferenceNetwork(nn.Module):
    """The network, (B, T) -> float32 logits (B, T, V) at all positions; weights as in `DIT`."""

    def __init__(self, config: DITConfig):
        super().__init__()
        dim = config.hidden_size
        self.vocab_embed = nn.ParameterDict(
            {"embedding": nn.Parameter(torch.empty(config.vocab_size, dim))}
        )
        if config.adaln:
            self.sigma_map = SigmaEmbedder(config.cond_dim)
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.empty(config.head_dim // 2))
        self.blocks = nn.ModuleList(ReferenceBlock(config) for _ in range(config.n_blocks))
        self.output_layer = nn.ModuleDict(
            {
                "norm_final": nn.LayerNorm(dim, bias=False),
                "linear": nn.Linear(dim, config.vocab_size),
            }
        )
        if config.adaln:
            self.output_layer["adaLN_modulation"] = nn.Linear(config.cond_dim, 2 * dim)

    def forward(
        self,
        tokens: Tensor,
        *,
        sigma: Tensor | None,
        positions: Tensor,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """tokens (B, T), sigma (B,) or None without conditioning, positions (T,), mask (T, T)."""
        condition = None if sigma is None else F.silu(self.sigma_map(sigma))  # (B, C)
        rotary = rotary_table(positions, self.rotary_emb.inv_freq)
        x = F.embedding(tokens, self.vocab_embed["embedding"])
        for block in self.blocks:
            x = block(x, condition=condition, rotary=rotary, mask=mask, is_causal=is_causal)
        x = self.output_layer["norm_final"](x)
        if condition is not None:
            modulation = self.output_layer["adaLN_modulation"](condition)[:, None]
            shift, scale = modulation.chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return self.output_layer["linear"](x).float()


class Reference(nn.Module):
    """Losses of the original, with the weights and the settings of a `Diffusion`.

    Args:
        model: shares its weights (no copy is made) and says what is computed.
    """

    def __init__(self, model: Diffusion):
        super().__init__()
        with torch.device("meta"):
            self.backbone = ReferenceNetwork(model.backbone.config)
        self.backbone.load_state_dict(model.backbone.state_dict(), assign=True)
        self.has_condition = model.backbone.config.adaln
        self.parameterization = model.denoiser.parameterization
        self.time_conditioning = model.denoiser.time_conditioning
        self.is_block_diffusion = model.pattern is AttentionPattern.BLOCK_DIFFUSION
        self.mask_index, self.ignore_bos = model.mask_index, model.ignore_bos
        self.block_size, self.antithetic = model.block_size, model.losses.antithetic
        self.noise, self.mdlm_loss_scale = model.noise, model.losses.mdlm_loss_scale
        self._mask: Tensor | None = None

    def token_losses(self, x_0: Tensor, *, interval: ClipInterval) -> Tensor:
        """As `Diffusion.token_losses`: (B, N), for ar (B, N - 1); draws the same random numbers."""
        if self.parameterization == "ar":
            return self._ar_losses(x_0)
        shape = (x_0.shape[0], x_0.shape[1] // self.block_size)
        t = sample_t(shape, interval=interval, antithetic=self.antithetic, device=x_0.device)
        values = noise_values(
            self.noise, t, interval=interval, mdlm_loss_scale=self.mdlm_loss_scale
        ).repeat_interleave(self.block_size)  # (B, N)
        u = torch.rand(x_0.shape, device=x_0.device)
        x_t = q_xt(
            x_0, u=u, move_chance=values.move_chance,
            mask_index=self.mask_index, ignore_bos=self.ignore_bos,
        )  # fmt: skip
        sigma = (-torch.log1p(-values.move_chance)).clamp(max=self.noise.sigma_max)
        logits = self._logits(x_t, x_0, sigma=sigma[:, 0])  # (B, N, V)
        if self.parameterization == "sedd":
            return self._score_entropy(logits, x_0, x_t=x_t, sigma=sigma, values=values)
        return self._nelbo(logits, x_0, x_t=x_t, values=values)

    def _logits(self, x_t: Tensor, x_0: Tensor, *, sigma: Tensor) -> Tensor:
        length = x_0.shape[1]
        tokens, mask = x_t, None
        if self.is_block_diffusion:
            tokens = torch.cat((x_t, x_0), dim=1)
            if self._mask is None or len(self._mask) != 2 * length:
                self._mask = dense_block_diffusion_mask(
                    length=length, block_size=self.block_size, device=x_0.device
                )
            mask = self._mask
        positions = torch.arange(tokens.shape[1], device=x_0.device) % length
        if not self.time_conditioning:
            sigma = torch.zeros_like(sigma)
        logits = self.backbone(
            tokens, sigma=sigma, positions=positions, mask=mask, is_causal=False
        )
        return logits[:, :length]

    def _nelbo(self, logits: Tensor, x_0: Tensor, *, x_t: Tensor, values: NoiseValues) -> Tensor:
        logits[..., self.mask_index] = MINUS_INFINITY
        log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
        known = x_t != self.mask_index
        log_p[known] = MINUS_INFINITY
        log_p[known, x_t[known]] = 0.0
        return values.loss_scaling * log_p.gather(-1, x_0[..., None]).squeeze(-1)

    def _score_entropy(
        self, logits: Tensor, x_0: Tensor, *, x_t: Tensor, sigma: Tensor, values: NoiseValues
    ) -> Tensor:
        expm1 = torch.expm1(sigma)
        score = logits - expm1.log()[..., None] - math.log(logits.shape[-1] - 1)
        score = score.scatter(-1, x_t[..., None], 0.0)
        masked = x_t == self.mask_index
        ratio = 1 / expm1[masked]
        of_masked = score[masked]  # (number of masks, V)
        exp = of_masked.exp()
        positive = exp.sum(dim=-1) - exp[:, self.mask_index]
        negative = ratio * of_masked.gather(-1, x_0[masked][:, None]).squeeze(-1)
        entropy = torch.zeros_like(sigma)
        entropy[masked] = positive - negative + ratio * (ratio.log() - 1)
        return -values.loss_scaling * expm1 * entropy

    def _ar_losses(self, x_0: Tensor) -> Tensor:
        inputs, targets = x_0[:, :-1], x_0[:, 1:]
        positions = torch.arange(inputs.shape[1], device=x_0.device)
        sigma = torch.zeros(len(x_0), device=x_0.device) if self.has_condition else None
        logits = self.backbone(
            inputs, sigma=sigma, positions=positions, mask=None, is_causal=True
        )
        logits[..., self.mask_index] = MINUS_INFINITY
        log_p = logits.log_softmax(dim=-1)
        return -log_p.gather(-1, targets[..., None]).squeeze(-1)


def reference_optimizer(
    parameters: list[nn.Parameter], settings: DictConfig
) -> torch.optim.Optimizer:
    """AdamW that goes through the tensors one by one; `settings` is the section `optim`."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
        fused=False,
    )


class ReferenceAverage:
    """The moving average of the weights, tensor by tensor."""

    def __init__(self, parameters: list[nn.Parameter], *, decay: float):
        self.decay, self.num_updates = decay, 0
        self.parameters = parameters
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            shadow.sub_((1 - decay) * (shadow - parameter))
