"""Layers are called where they are not exactly what the network was built of.

Adapters that PEFT put on an exported model did nothing in the loss, had no gradient, or were
ignored by samplers, because fast paths read the weights.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from models.denoiser import Denoiser
from models.dit import Target
from models.inference import InferenceDIT, cast_matrices
from models.kernels.packed_linear import PackedLinear
from models.masks import AttentionPattern
from models.plain import is_plain
from tests.helpers.references import MASK, random_tokens, small_dit

P = AttentionPattern
LAYERS = (
    "blocks.0.attn_qkv", "blocks.1.attn_out", "blocks.0.mlp.0", "blocks.1.mlp.2",
    "blocks.1.adaLN_modulation", "sigma_map.mlp.0", "output_layer.linear",
    "output_layer.adaLN_modulation",
)  # fmt: skip


class Adapted(nn.Module):
    """What PEFT puts in a layer's place; `weight` is still the frozen one's."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.delta = nn.Linear(layer.in_features, layer.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.delta(x)

    def merged(self) -> nn.Linear:
        layer = nn.Linear(*self.weight.shape[::-1], bias=self.base_layer.bias is not None)
        layer.load_state_dict(self.base_layer.state_dict())
        layer.weight.data += self.delta.weight.data
        return layer


class Quantized(nn.Linear):
    """Like bitsandbytes' layers: an nn.Linear by class, whose weight is of integers."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.scale = layer.weight.detach().abs().max().item() / 127
        integers = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)

    def merged(self) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight.data = self.weight.data * self.scale
        layer.bias = self.bias
        return layer


def sampled(network) -> Denoiser:
    """What samplers call."""
    return Denoiser(backbone=network, parameterization="subs", mask_index=MASK).for_sampling()


def swapped(name: str, make):
    """A network with one layer in another form, and one whose layer was merged."""
    torch.manual_seed(0)
    network, merged = small_dit(), small_dit()
    layer = make(network.get_submodule(name))
    network.set_submodule(name, layer)
    merged.set_submodule(name, layer.merged())
    return network, merged


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("make", [Adapted, Quantized])
def test_changed_layers_count_in_losses_and_samples(name, make):
    """Logits, scores of tokens with gradients, and the passes of samplers, with a cache too."""
    network, merged = swapped(name, make)
    tokens = random_tokens(2, 8)
    target = Target(tokens, MASK)
    results = [net(tokens, pattern=P.FULL, target=target) for net in (network, merged)]
    torch.testing.assert_close(*results)
    torch.stack(results[0]).sum().backward()
    if make is Adapted:
        assert network.get_submodule(name).delta.weight.grad.any()
    denoisers = [sampled(net) for net in (network, merged)]
    assert [isinstance(d.backbone, InferenceDIT) for d in denoisers] == [False, True]
    with torch.no_grad():
        for first, rest in ((tokens, None), (tokens[:, :4], tokens[:, 4:])):
            found = []
            for denoiser in denoisers:
                cache = denoiser.make_cache(2, capacity=8)
                how = {"pattern": P.BLOCK_CAUSAL, "kv_cache": cache}
                found.append(denoiser.logits(first, **how))
                cache.commit(first.shape[1])
                if rest is not None:
                    found[-1] = denoiser.logits(rest, **how)
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def hooked(network):
    layer = network.blocks[0].mlp
    layer.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def prehooked(network):
    layer = network.output_layer.linear
    layer.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))


def activation(network):
    network.blocks[0].mlp[1].register_forward_hook(lambda _module, _inputs, output: -output)


def parametrized(network):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(network.blocks[1].mlp[2], "weight", Half())


def wrapped(network):
    layer = network.blocks[1].mlp[2]
    old = layer.forward
    layer.forward = lambda x: 3 * old(x)


@pytest.mark.parametrize("change", [hooked, prehooked, activation, parametrized, wrapped])
def test_hooks_count_with_and_without_gradients(change):
    """The saving form of the feed-forward network, and the chunked head, heed them too."""
    network, tokens = small_dit(), random_tokens(2, 8)
    target = Target(tokens, MASK)
    before = network(tokens, pattern=P.FULL, target=target)
    change(network)
    found = network(tokens, pattern=P.FULL, target=target)
    assert not torch.allclose(found.log_p, before.log_p)
    with torch.no_grad():
        logits = network(tokens, pattern=P.FULL)
        logits[..., MASK] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).flatten()
        torch.testing.assert_close(found.log_p, expected)
        fast = sampled(network)
        torch.testing.assert_close(
            fast.logits(tokens, pattern=P.FULL)[..., :MASK], logits[..., :MASK]
        )


def test_recomputation_is_no_change():
    """Samples drawn during a training with `training.activation_checkpointing` stay fast."""
    network = small_dit()
    assert is_plain(network.blocks[0].mlp[2], nn.Linear)
    assert not is_plain(network.blocks[0].mlp[2], nn.Sequential)
    for block in network.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    fast = sampled(network)
    assert isinstance(fast.backbone, InferenceDIT)


def test_only_plain_layers_are_cast():
    """Integers stay integers, and what is called keeps its way of computing."""
    network, _ = swapped("blocks.0.mlp.0", Quantized)
    cast_matrices(network, torch.bfloat16)
    assert network.blocks[0].mlp[0].weight.dtype == torch.int8
    packed = network.blocks[0].mlp[2]
    assert packed.weight.dtype == torch.bfloat16 and type(packed) in (nn.Linear, PackedLinear)


def test_float64_is_kept():
    """`model.double()`: logits agree with float32, and samplers call the network itself."""
    network, tokens = small_dit(), random_tokens(2, 8)
    with torch.no_grad():
        expected = network(tokens, pattern=P.BLOCK_CAUSAL)
        denoiser = sampled(network.double())
        how = {"pattern": P.BLOCK_CAUSAL, "kv_cache": denoiser.make_cache(2, capacity=8)}
        found = denoiser.logits(tokens, **how)
    assert denoiser.backbone is network and found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
