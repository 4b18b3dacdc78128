"""Two real processes of one run, with a fault in one of them: how each ended, when, and why."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SMALL = (
    "--config=configs/debug.py",
    "--config.simulate_devices=1",
    "--config.mesh.data=2",
    "--config.mesh.expert=1",
    "--config.mesh.model=1",
    "--config.model.repeats=1",
    "--config.model.prefix=()",
    "--config.train.steps=12",
    "--config.checkpoint.every=3",
    "--config.log.every=1",
    "--config.eval.every=0",
    "--config.eval.sample_tokens=0",
    "--config.eval.final_batches=1",
    "--config.log.tensorboard=False",
    "--config.limits.heartbeat=4",
    "--config.limits.step=6",
    "--config.limits.grace=3",
)
PATIENCE = 240  # seconds for a whole run: a machine may be busy


class End(NamedTuple):
    """How a process ended."""

    code: int
    after: float  # seconds after the fault; NaN when none happened
    log: str

    @property
    def last(self) -> str:
        """The last line that it printed."""
        return self.log.strip().splitlines()[-1] if self.log.strip() else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, *flags, of_each=((), ())):
    """Returns the two processes of a run in `folder`/run, with their logs in `folder`/N.log."""
    port, processes = free_port(), []
    for number in (0, 1):
        words = [sys.executable, "-m", "moe_jax.main", f"--coordinator=127.0.0.1:{port}"]
        words += ["--num_processes=2", f"--process_id={number}", f"--workdir={folder / 'run'}"]
        words += [*SMALL, *flags, *of_each[number]]
        environment = {**os.environ, "PJRT_NPROC": "64"}
        with open(folder / f"{number}.log", "w") as log:
            process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=environment)
        processes.append(process)
    return processes


def ends(folder, processes, stopped=()):
    """Waits for both processes, and returns their Ends. Those that are `stopped` are killed when
    the others have ended.
    """
    when = {}
    begun = time.monotonic()
    while len(when) < len(processes) - len(stopped):
        for number, process in enumerate(processes):
            if number not in when and number not in stopped and process.poll() is not None:
                when[number] = time.time()
        if time.monotonic() - begun > PATIENCE:
            for process in processes:
                process.kill()
            raise AssertionError([text(folder, number) for number in (0, 1)])
        time.sleep(0.02)
    for number in stopped:
        processes[number].kill()
        processes[number].wait()
        when[number] = float("nan")
    happened = [path.stat().st_mtime for path in (folder / "run/faults").glob("*")]
    fault = min(happened, default=float("nan"))
    return [
        End(process.returncode, when[number] - fault, text(folder, number))
        for number, process in enumerate(processes)
    ]


def text(folder, number):
    """What a process printed, without the lines of Gloo."""
    lines = (folder / f"{number}.log").read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if not re.search(r"\[Gloo\]|peer ranks", line))


def run(folder, *flags, of_each=((), ()), stopped=()):
    return ends(folder, start(folder, *flags, of_each=of_each), stopped)
