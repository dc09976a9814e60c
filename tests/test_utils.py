"""Seeds, files, the cosine schedule, the logger."""

import errno
import logging

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.utilities import rank_zero_only

from training.optimizer import cosine_decay_with_warmup
from utils import absolute_path, derive_seed, file_exists, get_logger, resolve_device, write_text


def learning_rates(steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.pop("lr", 1.0))
    schedule = cosine_decay_with_warmup(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_schedule_at_its_corners():
    """Warm-up from 0.1 to the peak 1 in 10 steps, cosine of 100 steps down to 0.2, then flat."""
    rates = learning_rates(130, t_initial=100, warmup_t=10, warmup_lr_init=0.1, lr_min=0.2)
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.6), "half way down"
    assert rates[110] == pytest.approx(0.2) and rates[129] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_cosine_schedule_that_counts_from_the_start():
    settings = {"t_initial": 100, "warmup_t": 10, "warmup_lr_init": 0.0, "lr_min": 0.0}
    rates = learning_rates(110, warmup_prefix=False, **settings)
    assert rates[50] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)


def test_cosine_schedule_scales_with_the_peak():
    settings = {"t_initial": 10, "warmup_t": 2, "warmup_lr_init": 1e-6, "lr_min": 1e-6}
    rates = learning_rates(15, lr=3e-4, **settings)
    assert rates[0] == pytest.approx(1e-6) and rates[2] == pytest.approx(3e-4)
    assert rates[14] == pytest.approx(1e-6)


def test_cosine_schedule_of_the_configuration(compose):
    """lr_scheduler=cosine_decay_warmup came from timm; it needs no other package now."""
    import hydra

    config = compose(["lr_scheduler=cosine_decay_warmup", "trainer.max_steps=100"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = hydra.utils.instantiate(config.lr_scheduler, optimizer=optimizer)
    assert schedule.get_last_lr() == [pytest.approx(1e-6)]
    for _ in range(100):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(1e-6)]


def test_seeds_are_distinct_and_repeat():
    seeds = {derive_seed(1, stream, rank, n) for stream in (0, 1) for rank in (0, 1)
             for n in range(50)}  # fmt: skip
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3) != derive_seed(3, 2, 1)


def test_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute_path("a/b", base="/x") == absolute_path("../a/b/", base="/x/y") == "/x/a/b"
    assert absolute_path("a") == f"{tmp_path}/a" and absolute_path("~/a") == "/home/someone/a"
    assert absolute_path("/a", base="/x") == "/a"
    assert absolute_path("gs://a/b", base="/x") == "gs://a/b"
    assert absolute_path("file:///a", base="/x") == absolute_path("local:///a", base="/x") == "/a"


def test_file_exists_takes_files_directories_and_urls(tmp_path):
    (tmp_path / "f").touch()
    assert file_exists(str(tmp_path)) and file_exists(f"file://{tmp_path}/f")
    assert not file_exists(str(tmp_path / "g"))


def test_write_text_makes_directories_and_replaces(tmp_path):
    path = tmp_path / "a/b/out.json"
    write_text(str(path), "one\n")
    write_text(str(path), "zwei ü\r\n")
    assert path.read_bytes() == "zwei ü\r\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["mv", "write"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(where, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    write_text(str(path), "old")
    if where == "mv":
        monkeypatch.setattr(LocalFileSystem, "mv", disk_full)
    else:
        opened = LocalFileSystem.open

        def open_on_full_disk(self, name, mode="rb", **kwargs):
            file = opened(self, name, mode, **kwargs)
            file.write = disk_full
            return file

        monkeypatch.setattr(LocalFileSystem, "open", open_on_full_disk)
    with pytest.raises(OSError, match=r"out.json: cannot be written \(.*No space left"):
        write_text(str(path), "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out.json: cannot be written"):
        write_text(str(tmp_path / "file/out.json"), "text")


def test_other_processes_are_silent(monkeypatch, caplog):
    logger = get_logger("tests.rank")
    caplog.set_level(logging.INFO)
    logger.info("from the first")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.info("from the second")
    assert [r.getMessage() for r in caplog.records] == ["from the first"]


def test_device_of_a_machine_without_gpu(fake_gpus):
    fake_gpus(0)
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"
