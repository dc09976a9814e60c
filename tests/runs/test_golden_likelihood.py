"""Likelihoods of the original's checkpoints from the command line, `mode=ppl_eval`."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.convert import main as convert
from corpora.tokenization import load_tokenizer
from tests.parity.published import lightning_overrides
from tests.parity.rows import Golden, load_golden

NAMES = ["ar_text8", "bd3lm_text8_block_size4", "mdlm_text8", "sedd_text8"]


def write_rows(golden: Golden, path: Path, *, times: int) -> None:
    """The golden rows as one running text, which is cut into the same rows again."""
    tokenizer = load_tokenizer(golden.meta["tokenizer"])
    path.write_text(tokenizer.decode(golden["x0"].flatten().tolist()) * times)


def evaluated(folder: Path, project: Path, overrides: list[str]) -> dict[str, float]:
    """Run the command; returns what it wrote."""
    done = subprocess.run(
        [sys.executable, "main.py", *overrides, f"hydra.run.dir={folder}/run"],
        cwd=project, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights matched, 0 missing, 0 unexpected, 0 reshaped" in done.stdout + done.stderr
    return json.loads((folder / "run" / "ppl_eval.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lightning", "hub"])
@pytest.mark.parametrize("name", NAMES)
def test_likelihood_on_the_command_line(name, form, shared, project, tmp_path):
    """ar exactly; else the mean over 64 draws of noise within three standard errors.

    A batch is the 200 golden rows, and every batch has noise of its own.
    """
    source = shared / "golden" / "lightning" / f"{name}.ckpt"
    golden = load_golden(source.with_suffix(".expected.safetensors"))
    draws = golden.meta.get("num_seeds", 1)
    write_rows(golden, tmp_path / "rows.txt", times=draws)
    overrides = lightning_overrides(source, golden)
    if form == "hub":
        assert convert([str(source), str(tmp_path / "hub")]) == 0
        overrides += [f"eval.checkpoint_path={tmp_path}/hub", "algo.backbone=hf_dit"]
    found = evaluated(tmp_path, project, [
        *overrides,
        "data=local", "data.tokenizer_name_or_path=text8",
        f"data.train_path={tmp_path}/rows.txt", f"data.valid_path={tmp_path}/rows.txt",
        f"data.cache_dir={tmp_path}/cache",
        "+data.insert_valid_eos=false", "+data.insert_valid_special=false",
        "algo.clip_search_widths=[]", "loader.eval_batch_size=200", "loader.num_workers=0",
        "trainer.devices=1", "trainer.precision=32", "wandb=null",
    ])  # fmt: skip
    assert found["num_rows"] == 200 * draws
    if "nll" in golden.meta:
        assert found["val/nll"] == pytest.approx(golden.meta["nll"], rel=1e-5)
    else:
        standard_error = golden.meta["nelbo_std_over_seeds"] / math.sqrt(draws)
        assert abs(found["val/nll"] - golden.meta["nelbo_mean"]) <= 3 * standard_error
