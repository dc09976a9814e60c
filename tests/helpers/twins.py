"""Small Hugging Face models, alone and with the weights of a small Lightning module."""

from diffusion import Diffusion
from hf import BD3LM, BD3LMConfig
from tests.helpers.small_module import module
from tests.helpers.small_run import ALGOS

SIZES = {
    "vocab_size": 20, "model_length": 8, "block_size": 4, "hidden_dim": 32, "cond_dim": 16,
    "n_blocks": 2, "n_heads": 2, "mask_index": 19, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# What `generate` of each algorithm is asked for.
OPTIONS = {
    "ar": {"kv_cache": True, "nucleus_p": 0.9},
    "bd3lm": {"kv_cache": True, "nucleus_p": 0.9},
    "mdlm": {"first_hitting": False, "num_steps": 5},
    "sedd": {"num_steps": 5},
}


def tiny(**changes) -> BD3LM:
    """A freshly initialised model."""
    return BD3LM(BD3LMConfig(**(SIZES | changes)))


def twins(compose, folder, algo: str, *changes: str) -> tuple[Diffusion, BD3LM]:
    """Both in evaluation; text8's 35 symbols, N = 16, L = 4 for bd3lm, two layers of 32."""
    lightning = module(compose, folder, *ALGOS[algo], *changes).eval()
    config = lightning.composed
    model = BD3LM(
        BD3LMConfig(
            block_size=config.block_size,
            vocab_size=lightning.backbone.config.vocab_size,
            model_length=config.model.length,
            cross_attn=config.algo.cross_attn,
            adaln=lightning.backbone.config.adaln,
            causal=algo == "ar",
            hidden_dim=config.model.hidden_size,
            cond_dim=config.model.cond_dim,
            n_blocks=config.model.n_blocks,
            n_heads=config.model.n_heads,
            dropout=config.model.dropout,
            time_conditioning=config.algo.time_conditioning,
            var_min=config.algo.var_min,
            parameterization=config.algo.parameterization,
            mask_index=lightning.mask_index,
            bos_token_id=lightning.bos_index,
            eos_token_id=lightning.eos_index,
        )
    )
    model.load_state_dict(lightning.state_dict())
    return lightning, model.eval()
