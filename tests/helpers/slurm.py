"""A Slurm of one node that says it has eight GPUs, in a folder, on the loopback interface.

munged, slurmctld and slurmd of Debian's packages `munge` and `slurm-wlm`, without cgroups, so that
it also runs inside containers. They need root, and are ended by their process ids.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
NUM_GPUS = 8

_SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
GresTypes=gpu
JobRequeue=1
KillWait={grace}
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=4000 Gres=gpu:{gpus} \
Feature=a5000,a6000,3090,a100 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What this machine lacks for a Slurm of its own, or None."""
    # Debian's daemons lie in /usr/sbin, which is not on every PATH.
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"needs Debian's packages slurm-wlm and munge ({', '.join(missing)} not found)"
    return None if os.geteuid() == 0 else "needs root, to start Slurm's daemons"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def wait_for(condition: Callable[[], object], *, what: str, seconds: float) -> None:
    """Waits until a condition holds.

    Raises:
        TimeoutError: it does not within the time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Slurm:
    """The daemons, from `start` to `stop`, and the commands of a user.

    Args:
        folder: for configuration, state and logs.
        grace: seconds between SIGTERM and SIGKILL for a job that must go.
    """

    def __init__(self, folder: Path, *, grace: int = 30):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": _path()}
        self._daemons: list[subprocess.Popen] = []
        self._configure(grace)

    def _configure(self, grace: int) -> None:
        for name in ("state", "spool", "devices"):
            (self.folder / name).mkdir(mode=0o755)
        for number in range(NUM_GPUS):
            (self.folder / f"devices/gpu{number}").touch()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        conf = _SLURM_CONF.format(
            folder=self.folder, host=socket.gethostname(), gpus=NUM_GPUS, grace=grace,
            controller_port=_free_port(), node_port=_free_port(),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)
        gres = f"AutoDetect=off\nName=gpu File={self.folder}/devices/gpu[0-{NUM_GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)

    def start(self) -> None:
        """Starts the daemons and waits until the node takes jobs."""
        files = {
            name: self.folder / f"munge.{name}" for name in ("socket", "key", "pid", "log", "seed")
        }
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={files['socket']}",
            f"--key-file={files['key']}", f"--pid-file={files['pid']}",
            f"--log-file={files['log']}", f"--seed-file={files['seed']}",
        )  # fmt: skip
        wait_for(files["socket"].exists, what="munged", seconds=20)
        self._daemon("slurmctld", "-c", "-D")
        self._daemon("slurmd", "-N", "localhost", "-D")
        wait_for(self._is_idle, what=f"a node that takes jobs ({self.folder})", seconds=60)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as output:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        self._daemons.append(daemon)

    def _is_idle(self) -> bool:
        state = self.run("sinfo", "--noheader", "--format=%T", check=False)
        return state.strip() == "idle"

    def stop(self) -> None:
        """Cancels what is left, and ends the daemons, the last one first."""
        self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, **settings: object) -> str:
        """Runs a command as a user of the cluster does, and returns what it printed."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False,
            **({"env": self.environment} | settings),
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows about a job: JobState, Restarts, ..."""
        fields = self.run("scontrol", "show", "job", job).split()
        return dict(field.partition("=")[::2] for field in fields)
