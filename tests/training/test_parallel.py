"""Arguments of the strategies, whose names depend on the version of torch."""

import inspect

import pytest
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from configuration.training_request import plain
from training import parallel
from training.parallel import in_words_of_this_torch


class OldDDP:
    """As of torch 2.11."""

    def __init__(self, module, broadcast_buffers=True, gradient_as_bucket_view=False):
        pass


class NewDDP:
    """As of torch 2.13."""

    def __init__(self, module, broadcast_buffers=None, forward_sync_buffers=None):
        pass


@pytest.mark.parametrize(
    ("version", "name"), [(OldDDP, "broadcast_buffers"), (NewDDP, "forward_sync_buffers")]
)
def test_buffers_are_not_sent_on_any_torch(compose, monkeypatch, version, name):
    """torch 2.11 does not know `forward_sync_buffers`: two processes ended in a TypeError."""
    monkeypatch.setattr(parallel, "DistributedDataParallel", version)
    section = plain(compose().strategy)
    found = in_words_of_this_torch(section)
    assert found == {
        "_target_": "lightning.pytorch.strategies.DDPStrategy",
        "find_unused_parameters": False,
        "gradient_as_bucket_view": True,
        name: False,
    }
    assert "forward_sync_buffers" in section, "what was given stays"


@pytest.mark.parametrize("choice", ["ddp", "fsdp"])
def test_this_torch_takes_the_arguments(compose, choice):
    section = in_words_of_this_torch(plain(compose([f"strategy={choice}"]).strategy))
    del section["_target_"]
    known = {*inspect.signature(DistributedDataParallel.__init__).parameters}
    assert set(section) <= known | {*inspect.signature(DDPStrategy.__init__).parameters}
