"""Runs of `main.run` one after the other in each of two processes, as on two GPUs.

`python -m tests.helpers.parallel_runs FOLDER` is one of the processes (started by `start_pair`): it
carries out the runs of FOLDER/runs.json, each in a directory of its own, and with gloo on the CPU.
"""

import gc
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import diffusion
import main
from configuration import resolvers
from losses.token_losses import TokenLosses
from modes import batch_size
from tests.helpers.places import PROJECT
from tests.helpers.small_run import overrides
from training.parallel import leave_process_group

TIMEOUT = 150  # seconds for all runs of a pair


@contextmanager
def noise_of_rows() -> Iterator[None]:
    """Makes the noise of a row a function of the row and of the draw's number within the step.

    So a row has the same noise in whatever batch and on whatever process it comes.
    """
    rand, add_noise = torch.rand, TokenLosses._add_noise
    rows: list[Tensor] = []
    draws = 0

    def rand_of_rows(shape: torch.Size, **_ignored: object) -> Tensor:
        nonlocal draws
        draws += 1
        return torch.stack([uniform(row, shape[1:], number=draws) for row in rows[-1]])

    def uniform(row: Tensor, shape: torch.Size, *, number: int) -> Tensor:
        digest = hashlib.sha256(f"{number} {row.tolist()}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return rand(shape, generator=generator)

    def with_rows(self, x_0: Tensor, **arguments: object) -> object:
        nonlocal draws
        rows.append(x_0)
        draws, torch.rand = 0, rand_of_rows
        try:
            return add_noise(self, x_0, **arguments)
        finally:
            torch.rand = rand

    TokenLosses._add_noise = with_rows
    try:
        yield
    finally:
        TokenLosses._add_noise = add_noise


@contextmanager
def nan_in_second_process() -> Iterator[None]:
    """Makes the second loss of the second process NaN."""
    training_step = diffusion.Diffusion.training_step

    def spoiled(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        is_it = self.global_rank == 1 and batch_idx == 1
        return training_step(self, batch, batch_idx) * (float("nan") if is_it else 1.0)

    diffusion.Diffusion.training_step = spoiled
    try:
        yield
    finally:
        diffusion.Diffusion.training_step = training_step


@contextmanager
def less_memory_in_second_process() -> Iterator[None]:
    """Makes the estimate of `loader.batch_size=auto` find 6 rows here and 3 in the second one."""

    def fits_by_estimate(step: Callable[[int], None], **_memory: object) -> Callable[[int], bool]:
        step(1)
        return lambda size: size <= (3 if os.environ["RANK"] == "1" else 6)

    original, batch_size.fits_by_estimate = batch_size.fits_by_estimate, fits_by_estimate
    try:
        yield
    finally:
        batch_size.fits_by_estimate = original


# How a run differs from one of the command line, by the start of its name.
PATCHES = {
    "drawn": nullcontext,
    "nan": nan_in_second_process,
    "memory": less_memory_in_second_process,
}


def run(folder: Path, name: str, changes: list[str]) -> None:
    """Carries out one run in FOLDER/NAME, on the text in FOLDER, by default with noise of rows.

    What it raises is written to FOLDER/NAME/errorRANK.txt.
    """
    directory = folder / name
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    resolvers.register_resolvers()
    with initialize_config_dir(str(PROJECT / "configs"), version_base=None):
        config = compose("config", overrides(folder, *changes))
    try:
        with PATCHES.get(name.partition("_")[0], noise_of_rows)():
            main.run(config, launch_dir=str(folder))
    except ValueError as error:
        Path(f"error{os.environ.get('RANK', 0)}.txt").write_text(str(error))


def start_pair(folder: Path, runs: dict[str, list[str]], *, nodes: int = 1) -> list[str]:
    """Carries out runs in two processes; returns what each process printed.

    Args:
        folder: has the text of `small_run.write_text`.
        runs: overrides by the name of the run.
        nodes: 1, or 2 for a process each on what passes for two nodes.
    """
    place = [f"trainer.num_nodes={nodes}", f"trainer.devices={2 // nodes}"]
    listed = {name: [*changes, *place] for name, changes in runs.items()}
    (folder / "runs.json").write_text(json.dumps(listed))
    ranks = [
        {"RANK": str(r), "NODE_RANK": str(r * (nodes - 1)), "LOCAL_RANK": str(r * (2 - nodes))}
        for r in range(2)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.helpers.parallel_runs", str(folder)]
    outputs = [(folder / f"output{rank}.txt").open("w+") for rank in range(2)]
    processes = [
        subprocess.Popen(
            command, env=shared | ranks[rank], cwd=folder,
            stdout=outputs[rank], stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        texts = []
        for output in outputs:
            output.seek(0)
            texts.append(output.read())
            output.close()
    assert codes == [0, 0], "\n".join(text[-5000:] for text in texts)
    return texts


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    place = Path(sys.argv[1])
    for run_name, run_changes in json.loads((place / "runs.json").read_text()).items():
        run(place, run_name, run_changes)
    leave_process_group()
    # One that is still referred to could abort the process at its end, now and then.
    alive = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
    assert not alive, f"still referred to by {gc.get_referrers(*alive)}"
