"""A run's directory belongs to it alone, however many runs begin in the same second."""

import os
import shutil
import socket
import tempfile
import uuid
from pathlib import Path

# Says who has made a run directory.
MARK = ".started_by"


def claim_directory(path: str) -> str:
    """Make a new directory at `path`, or where there is one already at `path-2`, `path-3`, ...

    It comes into being with its mark in it, by a renaming that fails where there is one: two
    processes never get the same, on network file systems neither. Those of one launch, by srun or
    torchrun, do.
    """
    target, launch = Path(path), launch_name()
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        made.chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp makes it for its owner alone
        (made / MARK).write_text(launch)
        number = 1
        while True:
            claimed = target if number == 1 else target.with_name(f"{target.name}-{number}")
            try:
                made.rename(claimed)  # replaces nothing but an empty directory
                return str(claimed)
            except OSError:
                if not claimed.exists():
                    raise
            if _mark_of(claimed) == launch:
                return str(claimed)
            number += 1
    finally:
        shutil.rmtree(made, ignore_errors=True)


def launch_name() -> str:
    """What processes have in common that were launched together, and nobody else has."""
    environment, host = os.environ, socket.gethostname()
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    elif int(environment.get("WORLD_SIZE", 1)) == 1:
        return f"process {os.getpid()} on {host}, {uuid.uuid4().hex}"
    elif environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]:
        return f"processes of {os.getppid()} on {host}"  # all on one node, where torchrun is
    else:
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return " ".join(f"{name}={environment.get(name)}" for name in names)


def _mark_of(directory: Path) -> str | None:
    try:
        return (directory / MARK).read_text()
    except OSError:
        return None
