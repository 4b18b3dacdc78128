"""SLURM on this machine: one controller and two nodes, without munge, accounts or cgroups."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client")
# Processes of the job, of the tests and of other people: nothing here measures time.
PATIENCE = 400.0
CONFIG = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A job that went back into the queue waits until its credential has expired: 120 s if not for this.
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait={kill_wait}
# More cores than the machine may have.
SlurmdParameters=config_overrides
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=16 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Returns why there can be no SLURM here; "" when its programs are there.

    Installs them where nobody's own machine is changed by it: as root, or on a machine of CI.
    """
    if shutil.which("slurmctld"):
        return ""
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    needs = f"SLURM is not installed: apt-get install {' '.join(PACKAGES)}"
    if not shutil.which("apt-get") or (root and not os.environ.get("CI")):
        return needs
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        for command in (["apt-get", "update", "-q"], install):
            subprocess.run([*root, *command], capture_output=True, timeout=PATIENCE, check=False)
    return "" if shutil.which("slurmctld") else needs


def free_ports(number: int) -> list[int]:
    """Consecutive ports that nobody listens at."""
    for first in range(26000, 28000, number):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + number):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + number))
    raise RuntimeError("no free ports")


class Cluster:
    """Two nodes, started by `start` and ended by `stop`."""

    def __init__(self, root: Path):
        self.root, self.logs = root, root / "logs"
        self.env = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PYTHON": sys.executable}
        # Fewer threads, as in training; the tests themselves need them.
        self.env.pop("PJRT_NPROC", None)
        self.env["MOE_JAX_LOGS"] = str(self.logs)

    def start(self) -> None:
        for name in ("state", "spool.n0", "spool.n1"):
            (self.root / name).mkdir()
        controller, *nodes = free_ports(3)
        text = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            root=self.root,
            port=controller,
            ports=f"[{nodes[0]}-{nodes[1]}]",
            kill_wait=60,
        )
        (self.root / "slurm.conf").write_text(text)
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "n0"], ["slurmd", "-N", "n1"]):
            subprocess.run(command, env=self.env, check=True, timeout=60)
        self.until(lambda: self.say("sinfo", "--noheader", "--format=%T").split() == ["idle"])

    def stop(self) -> None:
        """Ends the daemons, and whatever jobs are left."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.say("scancel", f"--user={getpass.getuser()}")
        for path in self.root.glob("*.pid"):
            pid = int(path.read_text())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            self.until(lambda pid=pid: not Path(f"/proc/{pid}").exists())

    def say(self, *command: str) -> str:
        """Returns the output of a command of SLURM."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def submit(self, name: str, *words: str, env: dict[str, str] | None = None) -> str:
        """Submits launch/slurm.sbatch with options and flags, and returns the number of the job."""
        output = self.root / f"{name}.out"
        command = ["sbatch", "--parsable", f"--output={output}", "--nodes=2", *words]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields that SLURM knows of a job, such as JobState, ExitCode and Restarts."""
        text = self.say("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: str) -> dict[str, str]:
        """Waits for the end of a job, and returns its fields."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until(lambda: self.job(job).get("JobState") in ended)
        return self.job(job)

    def running(self, job: str, restarts: int) -> None:
        """Waits until a start of a job runs."""

        def runs() -> bool:
            fields = self.job(job)
            return (fields["JobState"], int(fields["Restarts"])) == ("RUNNING", restarts)

        self.until(runs)

    def until(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.told()
            time.sleep(0.2)

    def told(self) -> str:
        """What the jobs and their processes said, for the message of a test that fails."""
        paths = [*sorted(self.root.glob("*.out")), *sorted(self.logs.glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)
