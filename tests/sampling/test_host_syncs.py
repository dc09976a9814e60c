"""What makes the CPU wait for a GPU while a block is filled, counted on the CPU."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.operations import waits
from models.denoiser import Denoiser
from sampling import decoding
from sampling.ar import AutoregressiveSampler
from sampling.decoding import Decoding
from sampling.stopping import StopRule
from tests.helpers.random_networks import BOS, MASK, canvas, generators, network, semi

RULE = StopRule(eos_index=MASK + 1, min_entropy=0.1)


class Waits(TorchDispatchMode):
    """Counts them, and calls of the network by `passes`."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.passes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if waits(name, args):
            self.seen[name] += 1
        elif name == "embedding":
            self.passes += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits_of(monkeypatch):
    """What a sampler waits for; a list made of a tensor is one wait, whatever its length."""

    def count(sampler, denoise: Denoiser, *, length: int = 64) -> Waits:
        counted, tolist = Waits(), torch.Tensor.tolist
        with monkeypatch.context() as patch, counted:
            patch.setattr(
                torch.Tensor, "tolist", lambda x: (counted.seen.update(["tolist"]), tolist(x))[1]
            )
            sampler.sample(denoise, canvas(3, length), generator=generators(range(3)))
        return counted

    return count


FORMS = pytest.mark.parametrize("compiled", [False, "graphs"])


@FORMS
@pytest.mark.parametrize("kind", [{}, {"num_steps": 5}, {"tokens_per_step": 2}])
def test_a_block_waits_twice(waits_of, kind, compiled):
    """A pass waited four times: for the number of passes, twice for that of its positions, and
    for where they are. Now a block does for that, and to know whether a row is left."""
    sampler = semi(16, use_cache=True, stop=RULE, **kind)
    found = waits_of(sampler, network(block_size=16).for_sampling(compiled=compiled))
    assert found.passes >= 4 * 4
    assert found.seen == {"tolist": 4, "_local_scalar_dense": 4}


def test_a_nucleus_waits_once_more(waits_of, monkeypatch):
    """Each pass waited for the rows whose nucleus has more tokens than were looked at."""
    sampler = semi(16, use_cache=True, stop=RULE, decoding=Decoding(nucleus_p=0.9))
    denoise = network(block_size=16).for_sampling()
    assert waits_of(sampler, denoise).seen["index"] == 63, "a CPU has nobody to wait for"
    monkeypatch.setattr(decoding, "runs_ahead", lambda device: True)
    assert waits_of(sampler, denoise).seen == {"tolist": 4, "_local_scalar_dense": 8}


@FORMS
def test_sixteen_tokens_wait_twice(waits_of, compiled):
    """The same for ar, which looks at its stop rule every 16 tokens."""
    sampler = AutoregressiveSampler(mask_index=MASK, pad_index=BOS, use_cache=True, stop=RULE)
    denoise = network(block_size=64, parameterization="ar").for_sampling(compiled=compiled)
    found = waits_of(sampler, denoise)
    assert found.passes == 63
    assert found.seen == {"tolist": 4, "_local_scalar_dense": 4}
