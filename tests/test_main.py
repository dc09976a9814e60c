"""The command line: paths, modes, warnings, loggers, precision and what an error looks like."""

import os
import subprocess
import sys

import pytest

import main
from configuration.training_request import lightning_precision
from tests.helpers.small_run import overrides, write_text


def test_relative_paths_are_seen_from_the_launch_directory(compose, tmp_path):
    """A run changes into its own directory; what the user typed is relative to where it began.

    The original looked for last.ckpt in the fresh run directory, and so never resumed.
    """
    (tmp_path / "tokenizer").mkdir()
    config = compose([
        "data=local",
        "data.train_path=text/*.txt",
        "data.valid_path=/abs/valid.txt",
        "data.tokenizer_name_or_path=tokenizer",
        "checkpointing.save_dir=kept",
        "eval.results_path=out.json",
        "training.from_pretrained=kuleshov-group/mdlm-owt",
        "eval.gen_ppl_eval_model_name_or_path=gpt2-large",
    ])  # fmt: skip
    main.make_paths_absolute(config, launch_dir=str(tmp_path))
    assert config.data.train_path == f"{tmp_path}/text/*.txt"
    assert config.data.valid_path == "/abs/valid.txt"
    assert config.data.tokenizer_name_or_path == f"{tmp_path}/tokenizer"
    assert config.eval.results_path == f"{tmp_path}/out.json"
    assert config.checkpointing.resume_ckpt_path == f"{tmp_path}/kept/checkpoints/last.ckpt"
    assert config.callbacks.checkpoint_monitor.dirpath == f"{tmp_path}/kept/checkpoints"
    assert config.training.from_pretrained == "kuleshov-group/mdlm-owt", "not a path: no such file"
    assert config.eval.gen_ppl_eval_model_name_or_path == "gpt2-large"


def test_urls_and_the_home_directory(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = compose(
        ["data=local", "data.train_path=s3://bucket/x.txt", "data.valid_path='~/v.txt'"]
    )
    main.make_paths_absolute(config, launch_dir=str(tmp_path))
    assert config.data.train_path == "s3://bucket/x.txt"
    assert config.data.valid_path == "/home/someone/v.txt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mode=trian", "mode=trian: allowed are train, ppl_eval, sample_eval"),
        ("then=[evaluate]", "then=.*evaluate.*: allowed is a list of train, ppl_eval"),
        ("block_size=5", "block_size=5: allowed are the divisors of model.length=32"),
    ],
)
def test_nothing_loads_before_the_configuration_is_checked(
    override, message, compose, tmp_path, monkeypatch
):
    """A mistyped mode trained, in the end."""

    def fail(*args, **kwargs):
        raise AssertionError("loaded before the check")

    for name in ("get_tokenizer", "get_dataloaders", "Diffusion", "build_trainer", "ppl_eval",
                 "sample_eval"):  # fmt: skip
        monkeypatch.setattr(main, name, fail)
    with pytest.raises(ValueError, match=message):
        main.run(compose(overrides(tmp_path, override)), launch_dir=str(tmp_path))


@pytest.mark.parametrize("key", ["prompts", "infill"])
def test_broken_texts_are_found_before_a_training(key, compose, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("trained before the check")

    monkeypatch.setattr(main, "train", fail)
    (tmp_path / "texts.jsonl").write_text("{broken\n")
    config = compose(overrides(tmp_path, "then=[sample_eval]", f"sampling.{key}=texts.jsonl"))
    with pytest.raises(ValueError, match="texts.jsonl:1: not JSON"):
        main.run(config, launch_dir=str(tmp_path))


def test_modes_run_in_order(compose, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(main, "train", lambda config, signals: seen.append("train"))
    monkeypatch.setattr(main, "ppl_eval", lambda config, trainer: seen.append("ppl_eval"))
    monkeypatch.setattr(main, "sample_eval", lambda config: seen.append("sample_eval"))
    monkeypatch.chdir(tmp_path)
    config = compose(overrides(tmp_path, "algo=mdlm", "then=[sample_eval,ppl_eval]"))
    main.run(config, launch_dir=str(tmp_path))
    assert seen == ["train", "sample_eval", "ppl_eval"]


def test_keys_without_effect_are_reported(compose, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(main, "train", lambda config, signals: None)
    changes = ("algo=mdlm", "training.coeff_clip=2.0", "noise.sigma_max=9")
    config = compose(overrides(tmp_path, *changes))
    main.run(config, launch_dir=str(tmp_path))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 2
    assert any("training.coeff_clip=2.0 has no effect" in text for text in warnings)


# --- trainer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [("bf16", "bf16-mixed"), (32, "32-true"), ("16", "16-mixed"), ("64-true", "64-true")],
)
def test_precision_of_the_original(given, expected):
    """`bf16` in the original's configs is mixed precision: the weights stay float32."""
    assert lightning_precision(given) == expected


def test_trainer_of_the_default_precision(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [o for o in overrides(tmp_path) if not o.startswith("trainer.precision")]
    trainer = main.build_trainer(compose(settings))
    assert trainer.precision == "bf16-mixed"


def test_a_missing_checkpoint_to_resume_is_an_error_if_it_was_named(compose, tmp_path):
    """The default place may be empty (a first run); a path the user typed may not."""

    def find(*changes: str):
        config = compose(overrides(tmp_path, *changes))
        main.make_paths_absolute(config, launch_dir=str(tmp_path))
        return main.checkpoint_to_resume(config)

    assert find("checkpointing.save_dir=kept") is None
    assert find("checkpointing.resume_ckpt_path=null") is None
    with pytest.raises(FileNotFoundError, match="checkpointing.resume_ckpt_path=.*/typo.ckpt"):
        find("checkpointing.resume_ckpt_path=typo.ckpt")


@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_resuming_from_no_checkpoint(content, compose, tmp_path, monkeypatch):
    write_text(tmp_path)
    (tmp_path / "bad.ckpt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    config = compose(overrides(tmp_path, "checkpointing.resume_ckpt_path=bad.ckpt"))
    with pytest.raises(ValueError, match="bad.ckpt: not a checkpoint that can be read safely"):
        main.run(config, launch_dir=str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


# --- errors on the terminal ------------------------------------------------------------------


def test_an_error_is_one_line_and_status_1(project, tmp_path):
    """What the user can mend is said without a traceback, in a process of its own."""
    command = [sys.executable, str(project / "main.py"), *overrides(tmp_path, "mode=ppl_evil"),
               f"hydra.run.dir={tmp_path}/run"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"},
    )  # fmt: skip
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 1, said
    assert "mode=ppl_evil: allowed are train, ppl_eval, sample_eval" in said
    assert "Traceback" not in said and len(said.splitlines()) == 1
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {".hydra", "main.log"}
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_ctrl_c_outside_of_a_training_is_one_line(compose, tmp_path, monkeypatch, caplog):
    """Sampling and evaluation ended in a page of traceback."""

    def stopped(config, *, launch_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", stopped)
    monkeypatch.setattr(main.hydra.utils, "get_original_cwd", lambda: str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main.main.__wrapped__(compose(overrides(tmp_path)))
    assert caught.value.code == 130 and "what is written stays" in caplog.text
