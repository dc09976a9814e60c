"""Parameter names and their order are file formats; these lists are frozen."""

import pytest
import torch

from models.dit import DIT, DITConfig

SIGMA_MAP = [f"sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
BLOCK = [
    "norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight",
    "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
]  # fmt: skip
MODULATION = ["adaLN_modulation.weight", "adaLN_modulation.bias"]
OUTPUT = ["norm_final.weight", "linear.weight", "linear.bias"]
# (D, C, blocks, heads) and millions of parameters at V = 50,258, with and without adaLN
SIZES = {"small": (768, 128, 12, 12), "medium": (1024, 128, 24, 16)}


def network(*, adaln: bool, n_blocks: int = 2) -> DIT:
    return DIT(
        DITConfig(
            vocab_size=11,
            block_size=4,
            hidden_size=16,
            cond_dim=8,
            n_blocks=n_blocks,
            n_heads=2,
            adaln=adaln,
        )  # fmt: skip
    )


def expected_names(*, adaln: bool, n_blocks: int = 2) -> list[str]:
    block = BLOCK + (MODULATION if adaln else [])
    names = ["vocab_embed.embedding", *(SIGMA_MAP if adaln else []), "rotary_emb.inv_freq"]
    names += [f"blocks.{i}.{name}" for i in range(n_blocks) for name in block]
    return names + [f"output_layer.{name}" for name in OUTPUT + (MODULATION if adaln else [])]


@pytest.mark.parametrize("adaln", [True, False])
def test_names_and_order(adaln):
    """The original's EMA and optimizer state are lists: entry i is the i-th parameter."""
    assert list(network(adaln=adaln).state_dict()) == expected_names(adaln=adaln)


@pytest.mark.parametrize("adaln", [True, False])
def test_parameters_are_the_state_without_its_buffer(adaln):
    names = [name for name, _ in network(adaln=adaln).named_parameters()]
    expected = expected_names(adaln=adaln)
    expected.remove("rotary_emb.inv_freq")
    assert names == expected


def test_shapes():
    shapes = {k: tuple(v.shape) for k, v in network(adaln=True, n_blocks=1).state_dict().items()}
    assert shapes == {
        "vocab_embed.embedding": (11, 16),
        "sigma_map.mlp.0.weight": (8, 256), "sigma_map.mlp.0.bias": (8,),
        "sigma_map.mlp.2.weight": (8, 8), "sigma_map.mlp.2.bias": (8,),
        "rotary_emb.inv_freq": (4,),
        "blocks.0.norm1.weight": (16,),
        "blocks.0.attn_qkv.weight": (48, 16), "blocks.0.attn_out.weight": (16, 16),
        "blocks.0.norm2.weight": (16,),
        "blocks.0.mlp.0.weight": (64, 16), "blocks.0.mlp.0.bias": (64,),
        "blocks.0.mlp.2.weight": (16, 64), "blocks.0.mlp.2.bias": (16,),
        "blocks.0.adaLN_modulation.weight": (96, 8), "blocks.0.adaLN_modulation.bias": (96,),
        "output_layer.norm_final.weight": (16,),
        "output_layer.linear.weight": (11, 16), "output_layer.linear.bias": (11,),
        "output_layer.adaLN_modulation.weight": (32, 8),
        "output_layer.adaLN_modulation.bias": (32,),
    }  # fmt: skip


def num_parameters(size: str) -> int:
    hidden_size, cond_dim, n_blocks, n_heads = SIZES[size]
    config = DITConfig(
        vocab_size=50_258, block_size=4, hidden_size=hidden_size, cond_dim=cond_dim,
        n_blocks=n_blocks, n_heads=n_heads,
    )  # fmt: skip
    with torch.device("meta"):
        return sum(p.numel() for p in DIT(config).parameters())


def test_small_has_the_published_size():
    assert round(num_parameters("small") / 1e6, 1) == 169.6


def test_medium_is_larger():
    assert num_parameters("medium") > 400e6
