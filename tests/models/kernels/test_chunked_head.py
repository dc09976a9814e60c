"""Logits of a part of the vocabulary at a time, beside all of them at once."""

import pytest
import torch
import torch.nn.functional as F

from models.dit import Target
from models.kernels.chunked_head import called_target_scores, target_scores
from models.masks import AttentionPattern
from tests.helpers.references import generator, random_tokens, small_dit

N, D, V, MASK = 37, 8, 23, 22


def inputs(dtype=torch.float64):
    g = generator()
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((N, D), (V, D), (V,)))
    leaves = [x.to(dtype).requires_grad_()]
    sums = torch.promote_types(dtype, torch.float32)  # weights stay float32 beside bf16 products
    leaves += [p.to(sums).requires_grad_() for p in (weight, bias)]
    return leaves, random_tokens(N).clamp(max=MASK - 1)


def plain(x, weight, bias, *, targets):
    """All logits at once; (n, 2): the target's and the log-sum without the mask."""
    logits = F.linear(x, weight, bias)
    logits = torch.cat((logits[:, :MASK], logits[:, MASK + 1 :]), dim=1)
    picked = logits.gather(-1, targets[:, None])[:, 0]
    return torch.stack((picked, logits.logsumexp(dim=-1)))


@pytest.mark.parametrize("chunk", [1, 10, 23, 100])
def test_equals_all_at_once_in_values_and_gradients(chunk):
    """In float64; the two outputs get different gradients from above."""
    leaves, targets = inputs()
    found = torch.stack(target_scores(*leaves, targets=targets, excluded=MASK, chunk=chunk))
    expected = plain(*leaves, targets=targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(2, N, generator=generator(3)).double()
    gradients = [torch.autograd.grad(out, leaves, upstream) for out in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)


def test_no_chunk_size_matters_in_bf16_either():
    """What is summed over chunks is summed in float32."""
    results = []
    for chunk in (5, 23):
        leaves, targets = inputs(torch.bfloat16)
        scores = target_scores(*leaves, targets=targets, excluded=MASK, chunk=chunk)
        loss = -scores.log_p.mean()
        results.append((scores, torch.autograd.grad(loss, leaves)))
    (one, gradients), (other, other_gradients) = results
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert gradients[1].dtype == torch.float32
    for a, b in zip(gradients, other_gradients, strict=True):
        assert torch.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0) > 0.9999


def test_nothing_masked_has_gradients_of_zero():
    """A short row may stay clean; training goes on, and every process has a gradient to share."""
    (x, weight, bias), _ = inputs()
    scores = target_scores(
        x[:0], weight, bias, targets=torch.empty(0, dtype=torch.int64), excluded=MASK
    )
    loss = scores.log_p.sum()
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (x, weight, bias)):
        assert not gradient.any()


@pytest.mark.parametrize("pattern", [AttentionPattern.FULL, AttentionPattern.BLOCK_DIFFUSION])
def test_network_scores_what_it_gives_as_logits(pattern):
    network = small_dit(block_size=4)
    x_0 = random_tokens(2, 12).clamp(max=MASK - 1)
    at = torch.rand(2, 12, generator=generator(1)) < 0.5
    x_t = x_0.masked_fill(at, MASK)
    pair = torch.cat((x_t, x_0), dim=1) if pattern is AttentionPattern.BLOCK_DIFFUSION else x_t
    logits = network(pair, pattern=pattern, logits_at=at)
    scores = network(pair, pattern=pattern, logits_at=at, target=Target(x_0[at], MASK))
    expected = F.cross_entropy(logits[:, :MASK], x_0[at], reduction="none")
    torch.testing.assert_close(-scores.log_p, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 10, 36, 1024])
@pytest.mark.parametrize("number", [N, 0])
def test_called_layer_gives_the_same(rows, number):
    """A layer with an adapter can only be called: some rows at a time, with the same gradients."""
    (x, weight, bias), targets = inputs()
    x, targets = x.detach()[:number].requires_grad_(), targets[:number]
    layer = torch.nn.Linear(D, V, dtype=torch.float64)
    layer.weight.data, layer.bias.data = weight.detach().double(), bias.detach().double()
    leaves = [x, layer.weight, layer.bias]
    found = called_target_scores(x, layer, targets=targets, excluded=MASK, rows=rows)
    expected = target_scores(*leaves, targets=targets, excluded=MASK)
    torch.testing.assert_close(found, expected, check_dtype=False)
    for a, b in zip(
        torch.autograd.grad(found.log_p.square().sum(), leaves),
        torch.autograd.grad(expected.log_p.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
