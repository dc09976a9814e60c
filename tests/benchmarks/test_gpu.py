"""benchmarks/gpu.sh: its commands are right ones, and what becomes of each is said."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, sampling
from benchmarks.gpu import Command, Outcome, Place, Unexpected
from benchmarks.steps import compose
from configuration import validate
from tests.helpers.places import PROJECT

SCRIPT = PROJECT / "benchmarks" / "gpu.sh"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("results", "scratch"):
        (tmp_path / name).mkdir()
    return Place(device="cpu", is_tiny=True, results=tmp_path / "results",
                 scratch=tmp_path / "scratch")  # fmt: skip


def python(code: str, **changes) -> Command:
    return Command(**{"name": "one", "words": ("-c", code)} | changes)


class TestCommands:
    @pytest.mark.parametrize("is_tiny", [True, False])
    def test_every_command_is_one(self, place, is_tiny):
        """Benchmarks take their options, and main.py its overrides."""
        place = Place(device="cpu", is_tiny=is_tiny, results=place.results, scratch=place.scratch)
        commands = [c for make, _ in gpu.PARTS.values() for c in make(place)]
        assert len({command.name for command in commands}) == len(commands)
        for command in commands:
            words = list(command.words)
            if words[0] == "main.py":
                validate(compose([w for w in words[1:] if not w.startswith("hydra.")]))
            elif words[1] != "pytest" and command.missing is None:
                importlib.import_module(words[1]).options(words[2:])

    def test_the_first_parts_leave_the_last_some_time(self):
        limits = [limit for _, limit in gpu.PARTS.values()]
        assert sum(limits[:-1]) < gpu.BUDGET <= 480

    def test_parts_by_name_and_number(self, capsys):
        def parts(*words: str) -> list[str]:
            return gpu.chosen(gpu.argparse.ArgumentParser(), words)

        assert parts() == list(gpu.PARTS)
        assert parts("head", "1") == ["quickstart", "head"]
        for word in ("0", "8", "none"):
            with pytest.raises(SystemExit):
                parts(word)
        assert "no part none; allowed: quickstart" in capsys.readouterr().err


class TestRun:
    def test_states(self, place):
        """Code and figures decide; figures of what failed are read where there are any."""
        states = [
            gpu.run(command, place, part="p", limit=20)
            for command in (
                python("print('well')", figures=gpu.last_line),
                python("print('ill'); exit(3)", figures=gpu.last_line),
                python("", figures=lambda *_: gpu.read_json(place, "none")),
                python("", missing="no file"),
            )
        ]
        assert [(one.state, one.figures) for one in states] == [
            ("ok", "well"), ("failed: exit code 3", "ill"), ("failed: wrote no none.json", ""),
            ("left out: no file", ""),
        ]  # fmt: skip
        assert gpu.run(python("1"), place, part="p", limit=0).state == "out of time"

    def test_the_limit_ends_what_a_command_has_started(self, place):
        """Its own processes too, and what was printed until then is kept."""
        # In one write: unbuffered, a line and its end are two, and those of both processes mix.
        code = "import os, time; os.fork(); os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)"
        began = time.perf_counter()
        outcome = gpu.run(python(code), place, part="p", limit=3)
        assert outcome.state == "out of time" and time.perf_counter() - began < 30
        pids = (place.results / "one.log").read_text().split()
        assert len(pids) == 2
        for pid in pids:
            status = Path(f"/proc/{pid}/status")  # gone, or dead and not yet waited for
            assert not status.exists() or "State:\tZ" in status.read_text()

    def test_a_part_shares_its_limit_and_the_summary_is_always_there(self, place, monkeypatch):
        """The archive too, which a machine that is taken away may be left with."""
        out = place.scratch / "out"
        monkeypatch.setenv("OUT", str(out))
        monkeypatch.setattr(gpu, "PARTS", {
            "first": (lambda _: [python("print('fell', flush=True)", figures=gpu.last_line)], 60),
            "second": (lambda _: [python("exit(2)", name="two")], 60),
        })  # fmt: skip
        outcomes = gpu.carry_out(["first", "second"], place, {"device": "d"}, budget=60)
        assert [one.state for one in outcomes] == ["ok", "failed: exit code 2"]
        text = (place.results / "summary.txt").read_text()
        assert "first/one: ok" in text and "    fell" in text and "second/two: failed" in text
        record = json.loads((place.results / "summary.json").read_text())
        assert [one["name"] for one in record["commands"]] == ["one", "two"]
        (archive,) = out.iterdir()
        with tarfile.open(archive) as file:
            assert {"results/summary.txt", "results/one.log"} <= set(file.getnames())
        late = gpu.carry_out(["first"], place, {}, budget=0)
        assert late == [Outcome(part="first", name="one", state="out of time")]


class TestFigures:
    @pytest.fixture
    def training(self, place):
        """Writes a run's numbers and log, and reads its figures."""

        def read(*losses: float, log: str = "") -> str:
            rows = [f"{loss},{100 * loss}" for loss in losses]
            text = "\n".join(["trainer/loss,trainer/tokens_per_second", ",", *rows])
            folder = place.scratch / "one" / "metrics"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.csv").write_text(text + "\n")
            (place.results / "one.log").write_text(log)
            return gpu.training_figures(place, "one")

        return read

    def test_a_loss_that_falls(self, training, place):
        log = "Recompiling function add\nRecompiling function add\n"
        assert training(8.0, 6.0, log=log) == "loss 8.00 to 6.00, 800 tokens/s, 2 recompiles"
        assert (place.results / "one_metrics.csv").is_file()

    @pytest.mark.parametrize("losses", [(8.0, 8.0), (8.0, float("nan")), ()])
    def test_a_loss_that_does_not_fall(self, training, losses):
        with pytest.raises(Unexpected, match="did not fall"):
            training(*losses)

    @pytest.mark.parametrize("line", [
        "W torch._dynamo hit config.recompile_limit (8)", "FailOnRecompileLimitHit: add",
        "torch._dynamo hit config.cache_size_limit (8)", "flex: falling back to dense scores",
        "FlexAttention was compiled for 64 shapes, which is the limit; SDPA, slower, computes",
    ])  # fmt: skip
    def test_a_compiler_that_gave_up(self, training, line):
        with pytest.raises(Unexpected, match="gave up"):
            training(8.0, 6.0, log=f"fine\n{line}\n")

    def test_texts_that_are_not_the_same(self, place):
        rows = [{"compiled": "false", "equal": 2, "texts": 2},
                {"compiled": "true", "equal": 1, "texts": 2}]  # fmt: skip
        path = place.results / "one.json"
        path.write_text(json.dumps({"rows": rows[:1], "failed": {"batch 2": "no"}}))
        assert gpu.same_texts(place, "one") == "compile=false: 2 of 2 equal; batch 2 failed: no"
        path.write_text(json.dumps({"rows": rows}))
        with pytest.raises(Unexpected, match="compile=true: 1 of 2 equal"):
            gpu.same_texts(place, "one")

    def test_steps_and_variants(self, place):
        profile = {"launches": 1200.0, "waits": {"cudaStreamSynchronize": 7.0}}
        row = {"name": "bf16", "seconds": 0.104, "tokens_per_second": 157_000, "share_of_peak": 0.3,
               "memory_mb": 9000, "times_reference": 2.5, "job": {"side": "ours"},
               "result": {"profile": profile}}  # fmt: skip
        (place.results / "one.json").write_text(json.dumps({"rows": [row]}))
        assert gpu.step_figures(place, "one") == (
            "bf16: 104 ms, 157,000 tokens/s, 30% of peak, 9,000 MB, 2.50 x reference, "
            "1,200 launches and 7 waits per step"
        )
        rows = [{"name": "a", "seconds": 0.002}, {"name": "b", "seconds": None},
                {"name": "c", "seconds": 0.001, "block_size": 4}]  # fmt: skip
        (place.results / "one.json").write_text(json.dumps({"rows": rows}))
        assert gpu.variants(place, "one") == "c, L = 4 1 ms; a 2 ms"


class TestSampling:
    TINY = ["--device", "cpu", "--model", "tiny", "--length", "4", "--block-size", "2",
            "--batch-size", "2", "--precision", "float32"]  # fmt: skip

    def test_ways_and_texts(self, monkeypatch, tmp_path, capsys):
        """A way that fails is named; the others are compared with the first."""
        monkeypatch.setitem(sampling.MODELS, "tiny", (16, 8, 1, 1))
        monkeypatch.setattr(sampling, "VOCAB_SIZE", 40)
        monkeypatch.setattr(sampling, "MASK", 39)
        monkeypatch.setattr(sampling, "BOS", 38)
        monkeypatch.setitem(sampling.COMPILED, "graphs", False)
        path = tmp_path / "texts.json"
        ways = ["--compile", "false", "graphs"]
        sampling.main([*self.TINY, *ways, "--texts", "--json", str(path)])
        rows = json.loads(path.read_text())["rows"]
        assert [(row["compiled"], row["equal"]) for row in rows] == [("false", 2), ("graphs", 2)]

        def fails(*_, compiled: str, **__):
            if compiled == "graphs":
                raise RuntimeError("no graphs here\nat all")
            return torch.ones(2, 4)

        monkeypatch.setattr(sampling, "draw", fails)
        sampling.main([*self.TINY, *ways, "--texts", "--json", str(path)])
        failed = json.loads(path.read_text())["failed"]
        assert failed == {"batch 2, compile=graphs": "RuntimeError: no graphs here"}
        assert "no graphs here" in capsys.readouterr().err

    def test_options(self):
        assert sampling.options([]).compile == ["false"]
        assert sampling.options(["--compile"]).compile == ["true"]


class TestScript:
    def test_is_clean(self):
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", SCRIPT], check=True)

    def test_stops_without_a_gpu(self):
        """It says that there is no device, and writes nothing."""
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device: the script would measure")
        before = set((PROJECT / "benchmarks").rglob("*.json"))
        env = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(["bash", SCRIPT, "1"], capture_output=True, text=True, env=env)
        assert done.returncode == 1
        assert "no CUDA device" in done.stderr
        assert set((PROJECT / "benchmarks").rglob("*.json")) == before

    @pytest.mark.slow
    def test_rehearsal_of_a_part(self, tmp_path):
        """Without a GPU, at a tiny size; the results are in the archive alone."""
        env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "TINY": "1",
                            "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}  # fmt: skip
        done = subprocess.run(["bash", SCRIPT, "3"], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        (archive,) = tmp_path.iterdir()
        assert archive.name.endswith(".tar.gz") and "head/head: " in done.stdout
