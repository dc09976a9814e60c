"""Weights & Biases, TensorBoard and the CSV file: which there are, and what resumed runs do."""

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf

import configuration
from configuration.training_request import logger_request
from tests.helpers.small_run import overrides
from training import loggers


class FakeWandbLogger:
    experiment = None

    def __init__(self, **arguments):
        self.arguments = arguments


@pytest.fixture
def with_wandb(compose, tmp_path, monkeypatch):
    """The request of a run that uses wandb and keeps its files in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def build(*changes: str):
        found = [o for o in overrides(tmp_path, *changes) if o != "wandb=null"]
        return logger_request(compose(found))

    return build


@pytest.fixture
def wandb_arguments(with_wandb, monkeypatch):
    """The arguments of the W&B logger for overrides, with or without a key on this machine."""
    monkeypatch.setattr(loggers, "WandbLogger", FakeWandbLogger)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def build(*changes: str, has_key: bool) -> dict:
        monkeypatch.setattr(wandb, "login", lambda **kwargs: has_key)
        _, logger = loggers.build_loggers(with_wandb(*changes))
        return logger.arguments

    return build


def test_no_wandb(compose, tmp_path):
    built = loggers.build_loggers(logger_request(compose(overrides(tmp_path, "wandb=null"))))
    assert [type(logger) for logger in built] == [CSVLogger]


def test_wandb_without_a_key_is_offline_and_says_so(wandb_arguments, caplog):
    arguments = wandb_arguments("algo=mdlm", has_key=False)
    assert arguments["offline"] is True
    assert "no API key, logging offline" in caplog.text
    assert arguments["project"] == "BD3-LMs" and arguments["config"]["algo"]["name"] == "mdlm"
    assert arguments["tags"] == ["loglinear", "local", "local"]


def test_wandb_with_a_key_is_online(wandb_arguments, caplog):
    assert "offline" not in wandb_arguments(has_key=True)
    assert "offline" not in caplog.text


def test_wandb_keeps_what_the_user_decided(wandb_arguments, monkeypatch):
    assert wandb_arguments("+wandb.offline=false", has_key=False)["offline"] is False
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "offline" not in wandb_arguments(has_key=False)


def test_the_end_of_a_run_waits_a_minute_for_a_server(wandb_arguments, monkeypatch):
    """wandb waits for ever, and a job without a server would never end."""
    assert wandb_arguments(has_key=True)["settings"] == {"finish_timeout": 60}
    changed = wandb_arguments("+wandb.settings={finish_timeout:5,quiet:true}", has_key=True)
    assert changed["settings"] == {"finish_timeout": 5, "quiet": True}
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")
    assert "settings" not in wandb_arguments(has_key=True)


def test_the_installed_wandb_tells_whether_it_has_a_key(with_wandb, monkeypatch, tmp_path):
    """wandb 0.31 has no `Api.api_key`: asking for it ended every run of the default logger."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert loggers.wandb_arguments(with_wandb())["offline"] is True


def test_a_run_that_goes_on_keeps_its_id(with_wandb):
    """Kept beside the checkpoints; a new directory is a new run even under the same defaults."""
    first = loggers.wandb_id(with_wandb())
    assert first != "None_1", "the original's id of all runs without a name"
    assert loggers.wandb_id(with_wandb("wandb.name=renamed")) == first
    assert loggers.wandb_id(with_wandb("checkpointing.save_dir=other")) != first
    assert loggers.wandb_id(with_wandb("checkpointing.resume_from_ckpt=false")) != first


def test_a_named_run_has_the_originals_id(with_wandb):
    assert loggers.wandb_id(with_wandb("wandb.name=owt", "seed=3")) == "owt_3"


@pytest.mark.slow
def test_wandb_itself_goes_on_with_the_id(with_wandb, tmp_path):
    """Two starts, offline, of one run."""
    for step in range(2):
        _, logger = loggers.build_loggers(
            with_wandb("+wandb.offline=true", "+wandb.mode=offline")
        )
        logger.log_metrics({"trainer/loss": 1.0}, step=step)
        assert logger.experiment.id == logger.version
        logger.experiment.finish()
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    kept = (tmp_path / "wandb_id.txt").read_text().strip()
    assert folders and all(name.endswith(f"-{kept}") for name in folders)


def test_tensorboard_instead(with_wandb, tmp_path):
    """All starts of a run write into one directory, which TensorBoard shows as one run."""
    for _ in range(2):
        csv, logger = loggers.build_loggers(with_wandb("logger=tensorboard"))
        assert (type(csv), type(logger)) == (CSVLogger, TensorBoardLogger)
        assert logger.log_dir.rstrip("/") == str(tmp_path / "tensorboard")
    logger.log_metrics({"trainer/loss": 1.0}, step=1)
    logger.finalize("success")
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_the_csv_file_alone(with_wandb):
    (logger,) = loggers.build_loggers(with_wandb("logger=csv"))
    assert type(logger) is CSVLogger


def test_an_unknown_logger_is_named(compose, tmp_path):
    config = compose(overrides(tmp_path, "logger.name=mlflow"))
    assert OmegaConf.select(config, "logger.name") == "mlflow"
    with pytest.raises(ValueError, match="logger.name=mlflow: allowed are wandb, tensorboard, csv"):
        configuration.validate(config)
