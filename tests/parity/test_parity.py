"""The original's results, and that the comparison with them can fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity.__main__ import CHECKS, folder_rows, main, table_of
from tests.parity.arithmetic import clip_rows, ema_rows, noise_rows
from tests.parity.network import backbone_rows, loss_rows
from tests.parity.published import hub_rows, lightning_rows
from tests.parity.rows import Row, relative
from tests.parity.scoring import score_rows, scorer_rows
from tests.parity.text import data_rows, detokenizer_rows

BACKBONES = ["ar", "bd3lm", "bd3lm_bs1", "bd3lm_full", "mdlm", "sedd"]
LOSSES = [
    "ar", "bd3lm", "bd3lm_bs1_nll", "bd3lm_clip_0.3_0.8", "bd3lm_clip_0.6_1.0",
    "mdlm", "mdlm_loss_scale", "sedd", "sedd_loss_scale",
]  # fmt: skip

HUB = ["bd3lm-block_size32-pretrain", "bd3lm-block_size4", "mdlm"]
LIGHTNING = [
    "ar_text8",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("bd3lm_text8_block_size4", "mdlm_text8", "sedd_text8")
    ),
]


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden"


def assert_all_ok(rows) -> None:
    rows = list(rows)
    assert rows
    assert [row for row in rows if row.status != "ok"] == []


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(golden, name):
    assert_all_ok(backbone_rows(golden / f"backbone_{name}.safetensors", backends=["sdpa"]))


def test_backbone_with_flex(golden):
    torch._dynamo.reset()  # the compiler gives up on a function after eight shapes
    assert_all_ok(backbone_rows(golden / "backbone_bd3lm.safetensors", backends=["flex"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_with_flex(golden, name):
    torch._dynamo.reset()
    assert_all_ok(backbone_rows(golden / f"backbone_{name}.safetensors", backends=["flex"]))


@pytest.mark.parametrize("name", LOSSES)
def test_loss(golden, name):
    assert_all_ok(loss_rows(golden / f"loss_{name}.safetensors"))


def test_noise_schedules(golden):
    assert_all_ok(noise_rows(golden / "noise_schedules.safetensors"))


def test_ema(golden):
    assert_all_ok(ema_rows(golden / "ema.safetensors"))


def test_clip_search(golden):
    assert_all_ok(clip_rows(golden / "clip_search.safetensors"))


def test_detokenizers(golden):
    assert_all_ok(detokenizer_rows(golden / "detokenizers.json"))


def test_data(golden):
    assert_all_ok(data_rows(golden / "data.json"))


def test_scores(golden):
    assert_all_ok(score_rows(golden / "gen_ppl.json"))


def test_scorer(golden):
    assert_all_ok(scorer_rows(golden / "tiny-gpt2"))


@pytest.mark.parametrize("name", HUB)
def test_hub_directory(golden, name):
    assert_all_ok(hub_rows(golden / "hub" / name))


@pytest.mark.parametrize("name", LIGHTNING)
def test_original_checkpoint(golden, name):
    assert_all_ok(lightning_rows(golden / "lightning" / f"{name}.ckpt"))


@pytest.mark.parametrize("key", ["gen_ppl", "entropy", "gen_length"])
def test_a_spoilt_score_fails(golden, tmp_path, key):
    (tmp_path / "tiny-gpt2").symlink_to(golden / "tiny-gpt2")
    entries = json.loads((golden / "gen_ppl.json").read_text())[:3]
    entries[1][key] *= 1.001
    (tmp_path / "gen_ppl.json").write_text(json.dumps(entries))
    statuses = [row.status for row in score_rows(tmp_path / "gen_ppl.json")]
    assert statuses.count("NOT OK") == 2, "one per batch size"


def test_every_golden_file_has_a_row(golden):
    """A file that no pattern matches would be passed over in silence."""
    matched = {path for pattern in CHECKS for path in golden.glob(pattern)}
    beside = {path for path in golden.glob("lightning/*.expected.safetensors")}
    loose = [
        path
        for path in golden.rglob("*")
        if path.is_file() and not matched & {path, *path.parents} and path not in beside
    ]
    # Exact likelihoods are no result of the original, and nothing here computes them yet.
    assert {path.name for path in loose} == {"README.md", "exact_likelihood.json"}


def test_what_is_not_checked_is_not_ok(golden, tmp_path):
    shutil.copy(golden / "gen_ppl.json", tmp_path)  # without the scorer
    statuses = [row.status for row in folder_rows(tmp_path)]
    assert statuses == ["not yet"]
    assert main([str(tmp_path)]) == 2, "nothing was compared, so nothing was found to be right"


# What a copy is spoilt with: (file, tensor or key of the metadata, check)
SPOILT = [
    ("noise_schedules", "log.loss_scaling", noise_rows),
    ("ema", "shadow1.step4", ema_rows),
    ("clip_search", "7", clip_rows),
    ("clip_search", "meta:best", clip_rows),
    ("clip_search", "meta:intervals", clip_rows),
    ("clip_search", "meta:logged", clip_rows),
    ("backbone_bd3lm", "logits", backbone_rows),
    ("backbone_bd3lm", "log_probs", backbone_rows),
    ("backbone_bd3lm", "sample_logits", backbone_rows),
    ("backbone_bd3lm", "backbone.blocks.1.norm2.weight", backbone_rows),
    ("backbone_sedd", "log_score", backbone_rows),
    ("loss_bd3lm", "move_chance", loss_rows),
    ("loss_bd3lm", "xt", loss_rows),
    ("loss_bd3lm", "train_nlls", loss_rows),
    ("loss_bd3lm", "eval_loss", loss_rows),
    ("loss_sedd", "grad.backbone.blocks.1.mlp.0.weight", loss_rows),
]


def spoil(source: Path, copy: Path, key: str) -> None:
    """Copy a golden file with one number changed a little."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if key.startswith("meta:"):
        meta = json.loads(metadata["meta"])
        value = meta[key.removeprefix("meta:")]
        if isinstance(value, dict):
            value[next(iter(value))] += 0.001
        else:
            (value[1] if isinstance(value[0], list) else value)[0] += 0.05
        metadata = {"meta": json.dumps(meta)}
    else:
        tensor = tensors[key].flatten()
        place = tensor.argmax()  # the last entry may stand for minus infinity
        tensor[place] += 0.01 if tensor.is_floating_point() else 1
        tensors[key] = tensor.view_as(tensors[key])
    save_file(tensors, copy, metadata=metadata)


@pytest.mark.parametrize(("name", "key", "check"), SPOILT)
def test_a_spoilt_copy_fails(golden, tmp_path, name, key, check):
    copy = tmp_path / f"{name}.safetensors"
    spoil(golden / copy.name, copy, key)
    options = {"backends": ["sdpa"]} if check is backbone_rows else {}
    assert "NOT OK" in [row.status for row in check(copy, **options)]


def test_a_spoilt_likelihood_fails(golden, tmp_path):
    name = "ar_text8.expected.safetensors"
    (tmp_path / "ar_text8.ckpt").symlink_to(golden / "lightning" / "ar_text8.ckpt")
    spoil(golden / "lightning" / name, tmp_path / name, "nlls")
    assert "NOT OK" in [row.status for row in lightning_rows(tmp_path / "ar_text8.ckpt")]


def test_spoilt_logits_of_a_hub_directory_fail(golden, tmp_path):
    for path in (golden / "hub" / "mdlm").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "expected.safetensors").unlink()
    source = golden / "hub" / "mdlm" / "expected.safetensors"
    spoil(source, tmp_path / "expected.safetensors", "logits")
    assert [row.status for row in hub_rows(tmp_path)] == ["NOT OK"]


@pytest.mark.parametrize(
    ("name", "key", "check"),
    [("data.json", "sha256", data_rows), ("detokenizers.json", None, detokenizer_rows)],
)
def test_a_spoilt_text_file_fails(golden, tmp_path, name, key, check):
    content = json.loads((golden / name).read_text())
    if key is None:
        content["wt"][3][1] += " "
    else:
        content = content[:1]
        content[0][key] = content[0][key][::-1]
    (tmp_path / name).write_text(json.dumps(content))
    assert [row.status for row in check(tmp_path / name)].count("NOT OK") == 1


def test_exit_status(golden, tmp_path, capsys):
    source = golden / "noise_schedules.safetensors"
    shutil.copy(source, tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "12 ok, 0 NOT OK" in capsys.readouterr().out
    spoil(source, tmp_path / source.name, "log.move_chance")
    assert main([str(tmp_path)]) == 1
    assert "11 ok, 1 NOT OK" in capsys.readouterr().out


def test_a_broken_file_fails_and_hides_no_other(golden, tmp_path, capsys):
    shutil.copy(golden / "ema.safetensors", tmp_path)
    (tmp_path / "clip_search.safetensors").write_bytes(b"torn")
    assert main([str(tmp_path)]) == 1
    assert "1 ok, 1 NOT OK" in capsys.readouterr().out


def test_a_folder_without_golden_files_is_no_success(tmp_path):
    assert main([str(tmp_path)]) == 2


def test_nan_is_not_ok():
    """A NaN is not larger than a tolerance either, so `difference > tolerance` would pass it."""
    assert Row("file", "logits", float("nan"), 1e-5).status == "NOT OK"
    nan = torch.tensor([1.0, float("nan")])
    assert Row("file", "logits", relative(nan, torch.ones(2)), 1e-5).status == "NOT OK"


def test_one_table_row_per_file():
    rows = [Row("a", "x", 0.0, 1.0), Row("a", "y", 2.0, 1.0), Row("b", "", None, None)]
    assert table_of(rows).row_count == 2
