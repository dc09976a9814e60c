"""Keys as typed, in the process that Hydra starts and in those that Lightning starts from it."""

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from training.typed_keys import typed_keys

TYPED = ["optim.lr=0.5", "lr_scheduler=constant", "+trainer.max_time='a=b'", "++seed=2", "~wandb"]
KEYS = {"optim.lr", "lr_scheduler", "trainer.max_time", "seed", "wandb"}


@pytest.mark.parametrize("is_child", [False, True])
def test_typed_keys(is_child, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(TYPED), ".hydra/overrides.yaml")
    hydra = {"output_subdir": None, "overrides": {"task": []}}
    if not is_child:
        hydra = {"output_subdir": ".hydra", "overrides": {"task": TYPED}}
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: OmegaConf.create(hydra)))
    assert typed_keys() >= KEYS
