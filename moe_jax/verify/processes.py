"""The same program on several real processes, each with its share of the simulated devices, as a
cluster would run it.

python -m moe_jax.verify.processes JOB.json INDEX      one of them; `run` starts them
"""

import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.parallel import mesh
from moe_jax.verify import states
from moe_jax.verify.program import Probe, Program

# Where they write their checkpoint together.
SAVED = "of_processes"
# Of process 0.
REPORT = "report.pickle"
# Seconds after which a process is taken to hang.
SECONDS = 300


class Report(NamedTuple):
    """Holds what process 0 reports."""

    probes: list[Probe]
    end: dict[str, Any]


def run(
    raw: Mapping[str, Any], lengths: mesh.Lengths, count: int, steps: int, folder: Path
) -> Report | str:
    """Runs a config on `count` processes, which share a mesh, from the state in folder/begin.

    Returns the report, or what went wrong.
    """
    # The system gives a port that is free, and the processes meet there.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    job = folder / "job.json"
    wanted = {"raw": raw, "mesh": str(lengths), "steps": steps, "count": count, "address": address}
    job.write_text(json.dumps(wanted))
    command = [sys.executable, "-m", "moe_jax.verify.processes", str(job)]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # All are started before one is waited for: they meet each other.
    started = [
        subprocess.Popen([*command, str(index)], text=True, **streams) for index in range(count)
    ]
    try:
        failures = [
            failure(process, f"process {index} of {count}") for index, process in enumerate(started)
        ]
    finally:
        # None outlives this one, which may have been interrupted.
        for process in started:
            process.kill()
            process.wait()
    if any(failures):
        return next(filter(None, failures))
    probes, end = pickle.loads((folder / REPORT).read_bytes())
    return Report([Probe(*probe) for probe in probes], end)


def failure(process: subprocess.Popen[str], name: str) -> str:
    """Waits for a process, and returns in one line what went wrong in it, "" for nothing."""
    try:
        text = process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        text = f"no end after {SECONDS} s"
        process.wait()
    if not process.returncode:
        return ""
    # The last line of a traceback is its error.
    last_line = (text.strip().splitlines() or ["without a word"])[-1]
    return f"{name} ends with {process.returncode}: {last_line[:300]}"


def work(path: Path, index: int) -> None:
    """Runs one process: the steps of the job on the whole mesh. Process 0 writes the report."""
    job = json.loads(path.read_text())
    lengths = mesh.parse(job["mesh"], "mesh")
    # Each process has its share of the devices.
    mesh.simulate(lengths.num_devices // job["count"])
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(
        job["address"], job["count"], index, coordinator_bind_address=job["address"]
    )
    program = Program(job["raw"], lengths).compile()
    begin = states.read(program, path.parent / "begin")
    end, probes = program.steps(begin, job["steps"])
    plain = [tuple(probe) for probe in (*probes, program.tied(begin))]
    # No Report: pickle would name its class by `__main__`, as this module is called here.
    report = plain, states.named(program, end)
    # All processes write the checkpoint together, as those of a run do.
    states.write(program, end, path.parent / SAVED)
    if index == 0:
        (path.parent / REPORT).write_bytes(pickle.dumps(report))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
