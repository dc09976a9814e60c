"""The original's results on a CUDA device."""

import pytest
import torch

from tests.parity.network import LOGITS, golden_denoiser, golden_input, golden_pattern
from tests.parity.rows import absolute, load_golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("name", ["ar", "bd3lm", "bd3lm_bs1", "bd3lm_full", "mdlm", "sedd"])
@torch.no_grad()
def test_logits(shared, name, backend):
    torch._dynamo.reset()
    golden = load_golden(shared / "golden" / f"backbone_{name}.safetensors")
    denoiser = golden_denoiser(golden, backend=backend, device="cuda")
    sigma = golden.tensors.get("sigma")
    logits = denoiser.logits(
        golden_input(golden).cuda(),
        None if sigma is None else sigma.cuda(),
        pattern=golden_pattern(golden),
    )
    assert absolute(logits.cpu(), golden["logits"]) <= LOGITS
