"""Jobs that are timed against each other: each in a process of its own, one at a time, in turn.

Processes do not share a heap, a pool of threads or a cache of programs, so no job is fast or slow
because of another one. While one runs all others wait for their turn.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import moe_jax
from moe_jax.bench.contract import Job, Timing
from moe_jax.errors import UserError
from moe_jax.terminal.working import Tell

# Runs of each job, when one of several is to be chosen.
TRIES = 2


def environment() -> dict[str, str]:
    """Returns the environment of a process that imports the package that runs here."""
    paths = [str(Path(moe_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Worker:
    """A process that has prepared a job.

    Raises UserError, with what the process said, when it cannot.
    """

    def __init__(self, job: Job):
        self.job = job
        # A file, and no pipe: nobody reads it as long as all goes well.
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_jax.bench.worker"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        try:
            self.facts = self._ask(json.dumps(job._asdict()))["facts"]
        except BaseException:
            self.close()
            raise
        self.seconds: list[float] = []
        self._memory = 0

    def run(self) -> None:
        """Runs the job once and notes its time."""
        answer = self._ask("run")
        self.seconds.append(answer["seconds"])
        self._memory = answer["memory"]

    def timing(self) -> Timing:
        return Timing(self.facts, tuple(self.seconds), self._memory)

    def close(self) -> None:
        """Ends the process."""
        # Killed, not asked: it may be in the middle of a run that nobody waits for.
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _ask(self, line: str) -> dict[str, Any]:
        """Returns the answer to a line."""
        assert self._process.stdin
        assert self._process.stdout
        # A process that has ended answers nothing, which is told below.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(self._why_ended())
        values = json.loads(answer)
        if "error" in values:
            raise UserError(f"{self.job.name}: {values['error']}")
        return values

    def _why_ended(self) -> str:
        """Returns in a line how a process ended that should not have."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            reason = "killed, as by a system that has no memory left"
        else:
            self._said.seek(0)
            lines = self._said.read().splitlines()
            # Of a traceback, the line that names the error.
            errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
            reason = (errors or lines or ["it said nothing"])[-1]
        return f"bench: the process of {self.job.name!r} ended with code {code}: {reason}"


def interleave(jobs: Sequence[Job], rounds: int, tell: Tell) -> dict[str, Timing]:
    """Returns the timing of each job by its name: `rounds` rounds in which each runs once, in turn.

    A machine that changes its speed then changes it for all.
    """
    with started(jobs, tell) as workers:
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            # One at a time: while it runs, the others wait for a line.
            for worker in workers:
                worker.run()
        return {worker.job.name: worker.timing() for worker in workers}


@contextlib.contextmanager
def started(jobs: Sequence[Job], tell: Tell) -> Iterator[list[Worker]]:
    """Yields a worker for each job; they are gone behind it."""
    workers: list[Worker] = []
    try:
        for job in jobs:
            tell(f"preparing {job.name}")
            workers.append(Worker(job))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def fastest(jobs: Sequence[Job], tell: Tell) -> Job:
    """Returns the one of several jobs that runs the fastest, by the best of TRIES."""
    if len(jobs) == 1:
        return jobs[0]
    best: dict[str, float] = {}
    for job in jobs:
        # Alone: jobs that are compared later are timed in turn, but here one is only chosen.
        timing = interleave([job], TRIES, tell)[job.name]
        best[job.name] = min(timing.seconds)
    return min(jobs, key=lambda job: best[job.name])
