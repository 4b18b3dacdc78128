"""How long a start takes: imports, compilation, and the first step of a run, cold and warm.

Each is a process of its own. "Cold" has no compiled programs of an earlier start, "warm" has those
of the start before.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_jax.bench.contract import Job
from moe_jax.bench.workers import Worker, environment
from moe_jax.errors import UserError
from moe_jax.terminal.working import Tell

# A run that has made no step by then is told of; it is killed when it has.
PATIENCE = 300.0
IMPORTS = (
    "import time; start = time.perf_counter(); import jax; middle = time.perf_counter(); "
    "import moe_jax.main; print(middle - start, time.perf_counter() - middle)"
)


def measure(job: Job, repeats: int, tell: Tell) -> dict[str, float]:
    """Returns the seconds of each part of a start, the smallest of some repeats.

    `job` names the config whose step is compiled.
    """
    imports, cold, warm, first, second = [], [], [], [], []
    for number in range(repeats):
        tell(f"starting, {number + 1} of {repeats}")
        # The smallest of some repeats: everything that disturbs a start makes it longer.
        imports.append(_imports())
        with tempfile.TemporaryDirectory() as folder:
            # The second compilation finds the programs of the first.
            cold.append(_compilation(job, folder))
            warm.append(_compilation(job, folder))
        with tempfile.TemporaryDirectory() as folder:
            first.append(_first_step(Path(folder), "cold"))
            second.append(_first_step(Path(folder), "warm"))
    return {
        "import jax": min(jax for jax, _ in imports),
        "import moe_jax.main beyond jax": min(ours for _, ours in imports),
        "trace the step": min(facts["trace"] for facts in cold),
        "compile the step, cold": min(facts["compile"] for facts in cold),
        "compile the step, kept": min(facts["compile"] for facts in warm),
        "quickstart to its first step, cold": min(first),
        "quickstart to its first step, second start": min(second),
    }


def _imports() -> tuple[float, float]:
    """Returns the seconds that importing jax takes, and the program of training after it."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"bench: moe_jax.main cannot be imported: {done.stderr.strip()[-300:]}")
    jax, ours = done.stdout.split()
    return float(jax), float(ours)


def _compilation(job: Job, folder: str) -> dict[str, Any]:
    """Returns the facts of one compilation, whose programs are kept in a folder."""
    worker = Worker(job._replace(kind="compilation", options={"cache": folder}))
    worker.close()
    return dict(worker.facts)


def _first_step(folder: Path, name: str) -> float:
    """Returns the seconds from the start of a process to the first logged step of a run."""
    workdir = folder / name
    command = [sys.executable, "-m", "moe_jax.main", "--config", "quickstart"]
    command += ["--workdir", str(workdir), "--config.log.every=1"]
    command += [f"--config.compile_cache={folder / 'compiled'}"]
    said = folder / f"{name}.txt"
    start = time.perf_counter()
    with said.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
        try:
            while not _has_step(workdir / "metrics.jsonl"):
                # It has ended, or taken too long: either way there is no step to wait for.
                if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                    raise UserError(f"bench: no first step of {' '.join(command[1:])}")
                time.sleep(0.02)
            seconds = time.perf_counter() - start
        finally:
            # What it has compiled is trusted by the next start once it has ended by itself.
            process.terminate()
            process.wait()
    return seconds


def _has_step(metrics: Path) -> bool:
    """Returns whether a run has logged a training step."""
    try:
        lines = metrics.read_text().splitlines()
    except FileNotFoundError:
        return False
    for line in lines:
        try:
            if "train/loss" in json.loads(line):
                return True
        except json.JSONDecodeError:
            # It is being written.
            return False
    return False
