"""What a step makes the device do: counted, and read from a profile."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import counts, measure
from benchmarks.operations import Operations
from benchmarks.profiled import gpu_profile, profile_steps
from benchmarks.steps import Job

SMALLEST = list(counts.SMALLEST)


def test_operations_that_compute_and_those_that_wait():
    """Views are no operations of a device; a mask as an index is waited for, and a number."""
    x = torch.arange(6.0)
    with Operations() as operations:
        y = x.view(2, 3).t()[0] + 1
        x[x > 2]
        y.sum().item()
    assert operations.computed == {"add": 1, "gt": 1, "index": 1, "sum": 1}
    assert operations.waits == {"nonzero": 1, "_local_scalar_dense": 1}


@pytest.mark.slow
def test_counts_of_a_step(tmp_path, capsys):
    """A row more costs memory for the backward pass; a shape is compiled once."""
    path = tmp_path / "counts.json"
    words = ["--model", "tiny", "--length", "32", "--block-size", "4"]
    counts.main([*words, "--overrides", *SMALLEST, "--json", str(path)])
    record = json.loads(path.read_text())
    assert {"date", "torch", "command", "title"} <= set(record)
    graphs = record["graphs"]
    assert graphs["first step"] > 0
    assert graphs["later steps"] == graphs["training again"] == graphs["validation again"] == 0
    assert record["operations"] == sum(record["operations_by_name"].values()) > 100
    assert record["kept_mb_per_row"] > 0
    assert len(record["visible"]) == 4
    assert "graphs compiled: first step" in capsys.readouterr().out


def test_products_are_left_out_of_the_counted_step():
    """Their shapes stay."""
    a, b, bias = torch.ones(2, 3), torch.ones(3, 4), torch.ones(4)
    with counts.WithoutProducts():
        results = [a @ b, torch.addmm(bias, a, b), torch.bmm(a[None], b[None])]
    assert [tuple(x.shape) for x in results] == [(2, 4), (2, 4), (1, 2, 4)]
    assert not any(x.any() for x in results)


class TestProfile:
    def test_of_a_cpu(self):
        x = torch.ones(8, 8)
        found = profile_steps(lambda: (x @ x).sum().item(), steps=2, device=torch.device("cpu"))
        assert found.launches == 2 and found.waits == {"_local_scalar_dense": 1}
        assert found.busy_ms > 0 and "aten::mm" in [name for name, *_ in found.slowest]

    def test_of_a_gpu(self):
        """Ranges that a program names hold kernels and are none; a copy is a launch."""

        def row(key: str, device: str, count: int, time: float = 0.0) -> SimpleNamespace:
            kind = SimpleNamespace(name=device)
            return SimpleNamespace(
                key=key, device_type=kind, count=count, self_device_time_total=time
            )

        rows = [
            row("aten::mm", "CPU", 8), row("cudaLaunchKernel", "CPU", 6),
            row("cuLaunchKernelEx", "CPU", 4), row("cudaMemcpyAsync", "CPU", 2),
            row("cudaStreamSynchronize", "CPU", 2), row("cudaDeviceSynchronize", "CPU", 1),
            row("gemm", "CUDA", 4, 3000.0), row("triton_fused", "CUDA", 6, 5000.0),
            row("## Call CompiledFxGraph", "CUDA", 2, 9000.0),
        ]  # fmt: skip
        found = gpu_profile(rows, steps=2)
        assert found.launches == 6 and found.waits == {"cudaStreamSynchronize": 1}
        assert found.busy_ms == 4
        assert found.slowest == [("triton_fused", 2.5, 3), ("gemm", 1.5, 2)]

    def test_of_a_job(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(measure, "matmul_peak", lambda *_, **__: 1.0)
        job = Job(work="train", side="ours", model="tiny", length=16, block_size=4,
                  warmup=0, steps=1, profiled=1, overrides=counts.SMALLEST)  # fmt: skip
        profile = measure.measure(job).profile
        assert profile["launches"] > 50 and len(profile["slowest"]) == 10
