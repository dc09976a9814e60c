"""Python on a machine that has nothing of this project."""

import os
import subprocess
import sys


def outside(command: list[str], *, cwd, home) -> subprocess.CompletedProcess:
    """Runs Python with nothing of this project in reach, and no network."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-P", *command], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )
