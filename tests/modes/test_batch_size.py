"""loader.batch_size=auto: the search alone, beside a plain one, and in runs."""

import pytest
import torch

import configuration
from modes import batch_size
from tests.helpers import parallel_runs
from tests.helpers.small_run import ALGOS, write_text

MEGABYTE = 2**20


def test_divisors():
    assert batch_size.divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("total", [1, 7, 12, 64, 360, 512])
def test_search_finds_the_largest(total):
    """Beside trying all, for every limit; what is tried is doubled, then bisected."""
    sizes = batch_size.divisors(total)
    for limit in range(total + 2):
        tried = []

        def fits(size, *, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        fitting = [size for size in sizes if size <= limit]
        assert batch_size.largest_fitting(sizes, fits) == (fitting[-1] if fitting else None)
        assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + total.bit_length()
        # Far beyond nothing is tried: to fail there takes long.
        largest = fitting[-1] if fitting else 0
        assert max(tried) <= next((s for s in sizes if s >= 2 * largest), sizes[-1])


def test_running_out_of_gpu_memory_is_caught(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def step(size: int) -> None:
        if size > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    fits = batch_size.fits_by_trying(step)
    assert batch_size.largest_fitting(batch_size.divisors(64), fits) == 8

    def broken(_size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        batch_size.fits_by_trying(broken)(1)


def test_estimate_from_two_small_batches():
    """100 MB and 30 MB per row: with 200 MB left after two rows there is room for eight."""
    used = []

    def peak() -> int:
        return (100 + 30 * used[-1]) * MEGABYTE if used else 0

    fits = batch_size.fits_by_estimate(used.append, peak=peak, room=lambda: 200 * MEGABYTE)
    assert used == [1, 2], "no larger batch is tried: it could end the process"
    assert batch_size.largest_fitting(range(1, 100), fits) == 8


def test_memory_of_this_computer():
    """What the process takes for a moment is seen, and again it is not."""
    before = batch_size.host_peak()
    assert 100 * MEGABYTE < before < 2**44
    block = bytearray(200 * MEGABYTE)
    block[::4096] = bytes(len(block) // 4096)
    assert batch_size.host_peak() >= 250 * MEGABYTE
    assert 0 < batch_size.host_room() < 2**44


def test_rules(compose, fake_gpus):
    configuration.validate(compose(["loader.batch_size=auto"]))
    with pytest.raises(ValueError, match="loader.batch_size=auto: allowed with mode=ppl_eval is"):
        configuration.validate(compose(["loader.batch_size=auto", "mode=ppl_eval"]))
    with pytest.raises(ValueError, match="trainer.accumulate_grad_batches=2: allowed with loader"):
        overrides = ["loader.batch_size=auto", "trainer.accumulate_grad_batches=2"]
        configuration.validate(compose(overrides))
    fake_gpus(3)
    with pytest.raises(ValueError, match="global_batch_size=512: allowed .* multiples of the 3"):
        configuration.validate(compose(["loader.batch_size=auto"]))


RUN = [*ALGOS["bd3lm"], "loader.batch_size=auto", "loader.global_batch_size=12"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("room", "rows"), [(1e12, 12), (0, 2)])
def test_a_run(folder, monkeypatch, caplog, room, rows):
    """The run is that of the same number given by hand, to the bit: nothing of the search stays."""
    peaks = iter([0, 100 * MEGABYTE, 0, 200 * MEGABYTE])
    monkeypatch.setattr(batch_size, "host_peak", lambda: next(peaks))
    monkeypatch.setattr(batch_size, "host_room", lambda: room)
    with caplog.at_level("INFO"):
        parallel_runs.run(folder, "found", RUN)
    assert f"{rows} rows per device, trainer.accumulate_grad_batches={12 // rows}" in caplog.text
    parallel_runs.run(folder, "given", [*RUN, f"loader.batch_size={rows}"])
    weights = [
        torch.load(folder / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("found", "given")
    ]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_agree(folder, strategy):
    """A process alone would take what fits there; the smaller one counts."""
    parallel_runs.start_pair(folder, {f"memory_{strategy}": [*RUN, f"strategy={strategy}"]})
    state = torch.load(folder / f"memory_{strategy}/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    loader = state["hyper_parameters"]["config"]["loader"]
    assert loader["batch_size"] == 3, "6 rows fit on the first process, 3 on the second"
