"""On a CUDA device: recorded passes give the texts of passes that are launched kernel by kernel."""

import pytest
import torch

from models.denoiser import Denoiser
from models.inference import InferenceDIT
from models.masks import AttentionPattern
from models.static_inference import StaticInferenceDIT
from sampling.base import blank_canvas
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_recorded_passes_equal_launched_ones(dtype):
    """Three passes of each shape: as written, recorded, replayed."""
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        plain = InferenceDIT(small_dit(block_size=4).cuda())
    static, tokens = StaticInferenceDIT(plain), random_tokens(2, 32).cuda()
    at = torch.zeros(2, 4, dtype=torch.bool, device="cuda")
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
def test_same_text_compiled_or_not():
    """Two batches, so that the second one needs new records and no new compilation."""
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
    for compiled in (False, True):
        fast = denoiser.for_sampling(compiled=compiled)
        outputs = [draw_rows(sampler, fast, canvas, seed=seed) for seed in (1, 2)]
        texts.append(torch.cat([output.tokens for output in outputs]))
    assert torch.equal(*texts)
