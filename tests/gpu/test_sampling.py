"""On a CUDA device: recorded passes give the texts of passes that are launched kernel by kernel."""

import pytest
import torch

from models.denoiser import Denoiser
from models.inference import InferenceDIT
from models.masks import AttentionPattern
from models.static_inference import StaticInferenceDIT
from sampling import decoding
from sampling.base import blank_canvas
from sampling.decoding import Decoding
from sampling.rows import draw_rows
from sampling.semi_ar import SemiAutoregressiveSampler
from sampling.stopping import StopRule
from tests.helpers.references import random_tokens, small_dit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

P = AttentionPattern
MASK = 22  # the last id of `small_dit`


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_recorded_passes_equal_launched_ones(dtype, compiles, number):
    """Three passes of each shape: as written, recorded, replayed; on any GPU of the process."""
    if number >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    device = torch.device("cuda", number)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        plain = InferenceDIT(small_dit(block_size=4).to(device))
    static = StaticInferenceDIT(plain, compiles=compiles)
    tokens = random_tokens(2, 32).to(device)
    at = torch.zeros(2, 4, dtype=torch.bool, device=device)
    at[0, 1] = at[1, 3] = True
    found = []
    for network in (plain, static):
        cache, logits = network.make_cache(2, capacity=16), []
        for start in range(0, 32, 4):
            block = tokens[:, start : start + 4]
            passed = network(block, pattern=P.BLOCK_CAUSAL, kv_cache=cache, logits_at=at)
            logits.append(passed.clone())
            cache.commit(4)
        found.append(torch.cat(logits).float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=tolerance)


@torch.no_grad()
def test_same_text_in_every_form():
    """Two batches, so that the second one needs neither new records nor a new compilation."""
    denoiser = Denoiser(
        backbone=small_dit(block_size=4).cuda(), parameterization="subs", mask_index=MASK
    )
    sampler = SemiAutoregressiveSampler(
        block_size=4,
        mask_index=MASK,
        pad_index=0,
        pattern=P.BLOCK_CAUSAL,
        use_cache=True,
        stop=StopRule(min_entropy=None),
    )
    canvas = blank_canvas(3, 32, bos_index=0, mask_index=MASK, device=torch.device("cuda"))
    texts = []
    for compiled in (False, True, "graphs"):
        fast, num_passes = denoiser.for_sampling(compiled=compiled), []
        for seed in (1, 2):
            texts.append(draw_rows(sampler, fast, canvas, seed=seed).tokens)
            num_passes.append(len(getattr(fast.backbone, "_passes", ())))
        assert num_passes[0] == num_passes[1]
    assert all(torch.equal(text, texts[i % 2]) for i, text in enumerate(texts))


@pytest.mark.parametrize("candidates", [2, 4096])
@torch.no_grad()
def test_guessed_nuclei_give_the_same_text(candidates, monkeypatch):
    """Without waiting, and again where the guess was too small."""
    denoiser = Denoiser(
        backbone=small_dit(block_size=4).cuda(), parameterization="subs", mask_index=MASK
    )
    sampler = SemiAutoregressiveSampler(
        block_size=4, mask_index=MASK, pad_index=0, pattern=P.BLOCK_CAUSAL, use_cache=True,
        stop=StopRule(min_entropy=None), decoding=Decoding(nucleus_p=0.9),
    )  # fmt: skip
    canvas = blank_canvas(3, 32, bos_index=0, mask_index=MASK, device=torch.device("cuda"))
    monkeypatch.setattr(decoding, "GUESSED_CANDIDATES", candidates)
    found = draw_rows(sampler, denoiser, canvas, seed=1)
    monkeypatch.setattr(decoding, "runs_ahead", lambda device: False)
    assert torch.equal(found.tokens, draw_rows(sampler, denoiser, canvas, seed=1).tokens)
