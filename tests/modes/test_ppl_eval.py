"""What ppl_eval writes (the whole path is in test_end_to_end.py)."""

import json
import math
from types import SimpleNamespace

import pytest

from checkpointing.weights import Weights
from hf.model_card import evaluation_table, read_results
from modes import ppl_eval as ppl_eval_module
from modes.ppl_eval import ppl_eval
from tests.helpers.small_run import overrides


def test_an_infinite_perplexity_is_null(compose, tmp_path, monkeypatch, capsys):
    """The file said `Infinity`, which is no JSON; the model card takes what it says now."""
    metrics = {"val/nll": 800.5, "val/nll_se": 9.0, "val/nll_mc_se": math.nan,
               "val/ppl": math.inf, "val/bpd": 1155.0, "val/tokens": 640.0,
               "val/rows": 20.0, "valid_var_0.00 - 1.00": math.nan}  # fmt: skip
    trainer = SimpleNamespace(
        global_rank=0, world_size=1, is_global_zero=True, validate=lambda *_, **__: [metrics]
    )
    monkeypatch.setattr(ppl_eval_module, "build_trainer", lambda *_: trainer)
    monkeypatch.setattr(ppl_eval_module, "read_weights", lambda _: Weights("a.ckpt", {}))
    model = SimpleNamespace(has_exact_nll=False)
    monkeypatch.setattr(ppl_eval_module, "load_model", lambda *_: model)
    monkeypatch.setattr(ppl_eval_module, "get_dataloaders", lambda *_, **__: (None, None))
    out = f"eval.results_path={tmp_path}/results.json"
    path = ppl_eval(compose(overrides(tmp_path, "mode=ppl_eval", out)))
    with open(path, encoding="utf-8") as file:
        found = json.load(file, parse_constant=pytest.fail)
    assert found["val/ppl"] is None and found["valid_var_0.00 - 1.00"] is None
    assert (found["val/nll"], found["num_tokens"]) == (800.5, 640)
    assert "inf" in capsys.readouterr().out
    assert found["val/nll_se"] == 9.0 and found["val/nll_mc_se"] is None
    assert found["val/ppl_95"] == [None, None]  # infinite too
    table = evaluation_table([read_results(path)], is_bound=False)
    assert "| local | not finite | 800.5000 | 1155.0000 | 640 |" in table
