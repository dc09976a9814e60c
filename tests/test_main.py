"""The command line: modes, warnings, and what an error looks like."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

import main
from tests.helpers.small_run import overrides


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

    for mode in main.MODES:
        monkeypatch.setitem(main.MODES, mode, fail)
    with pytest.raises(ValueError, match=message):
        main.run(compose(overrides(tmp_path, override)), launch_dir=str(tmp_path))


@pytest.mark.parametrize("key", ["prompts", "infill"])
def test_broken_texts_are_found_before_a_training(key, compose, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("trained before the check")

    monkeypatch.setitem(main.MODES, "train", fail)
    (tmp_path / "texts.jsonl").write_text("{broken\n")
    config = compose(overrides(tmp_path, "then=[sample_eval]", f"sampling.{key}=texts.jsonl"))
    with pytest.raises(ValueError, match="texts.jsonl, line 1: not JSON"):
        main.run(config, launch_dir=str(tmp_path))


def test_modes_run_in_order(compose, tmp_path, monkeypatch):
    seen = []
    for mode in main.MODES:
        monkeypatch.setitem(main.MODES, mode, lambda config, mode=mode: seen.append(mode))
    monkeypatch.chdir(tmp_path)
    config = compose(overrides(tmp_path, "algo=mdlm", "then=[sample_eval,ppl_eval]"))
    main.run(config, launch_dir=str(tmp_path))
    assert seen == ["train", "sample_eval", "ppl_eval"]


@pytest.mark.parametrize(("setting", "precision"), [("true", "high"), ("false", "highest")])
def test_tf32_is_asked_for(setting, precision, compose, tmp_path, monkeypatch):
    """For every mode; without it float32 is float32."""
    before, seen = torch.get_float32_matmul_precision(), []
    for mode in main.MODES:
        monkeypatch.setitem(
            main.MODES, mode, lambda config: seen.append(torch.get_float32_matmul_precision())
        )
    monkeypatch.chdir(tmp_path)
    config = compose(overrides(tmp_path, "mode=ppl_eval", f"training.tf32={setting}"))
    try:
        main.run(config, launch_dir=str(tmp_path))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [precision]


def test_keys_without_effect_are_reported(compose, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(main.MODES, "train", lambda config: None)
    changes = ("algo=mdlm", "training.coeff_clip=2.0", "noise.sigma_max=9")
    config = compose(overrides(tmp_path, *changes))
    main.run(config, launch_dir=str(tmp_path))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 2
    assert any("training.coeff_clip=2.0 has no effect" in text for text in warnings)


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("key=1:\n allowed"), "key=1: allowed"),
        (ValueError(), "ValueError"),
        (OSError(28, "No space left", "file"), "[Errno 28] No space left: 'file'"),
        (MisconfigurationException("0.1 * 9 < 1"), "0.1 * 9 < 1"),
        (torch.OutOfMemoryError("CUDA out of memory."), "A smaller loader.batch_size"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, said, failing_main, caplog):
    with pytest.raises(SystemExit) as caught:
        failing_main(error)
    assert caught.value.code == 1
    (message,) = caplog.messages
    assert said in message and "\n" not in message


class BrokenText(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise ValueError("a.jsonl, line 3: no text\nallowed: text")


def test_an_error_in_a_loading_process_is_one_line():
    """torch puts the whole traceback of that process into the message."""
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        next(iter(torch.utils.data.DataLoader(BrokenText(), num_workers=1)))
    assert main.explained(caught.value) == "a.jsonl, line 3: no text allowed: text"


def test_a_deleted_key_is_named(run_main, caplog):
    with pytest.raises(OmegaConfBaseException) as caught:
        run_main("run", "~trainer.max_steps")
    assert main.explained(caught.value) == "trainer.max_steps: Key 'max_steps' is not in struct"


def test_an_error_of_the_program_keeps_its_traceback(failing_main, caplog):
    with pytest.raises(KeyError):
        failing_main(KeyError("state"))
    assert "please report" in caplog.text


@pytest.fixture
def failing_main(compose, tmp_path, monkeypatch):
    """Runs the command's function, in which an error comes up: `failing_main(ValueError())`."""

    def call(error: BaseException) -> None:
        def fail(config, *, launch_dir):
            raise error

        monkeypatch.setattr(main, "run", fail)
        monkeypatch.setattr(main.hydra.utils, "get_original_cwd", lambda: str(tmp_path))
        main.main.__wrapped__(compose(overrides(tmp_path)))

    return call


def test_ctrl_c_outside_of_a_training_is_one_line(failing_main, caplog):
    """Sampling and evaluation ended in a page of traceback."""
    with pytest.raises(SystemExit) as caught:
        failing_main(KeyboardInterrupt())
    assert caught.value.code == 130 and "what is written stays" in caplog.text
