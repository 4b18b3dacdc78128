"""Kills a run at random times, starts it again, and compares it with a run that nobody killed.

    PYTHONPATH=. python tools/kill_loop.py --kills 50
    PYTHONPATH=. python tools/kill_loop.py --kills 10 --processes 2
    PYTHONPATH=. python tools/kill_loop.py --kills 100 --signal TERM

A kill is SIGKILL (or another signal), at a random moment: during imports, compilation, steps, a
save, the removal of an old checkpoint, an evaluation. With two processes one of them, or both, are
killed; the other ends by itself. With SIGTERM every signal must be heard: the log has a line of
each, and the run ends by itself with 0, or with 143 where there was nothing to save. At the end
every logged loss and gradient norm must have the same bits as in the run that was not killed, and
so must every array of the last checkpoint. Ends with 1 if one differs, or if a SIGTERM was lost.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from moe_jax.checkpoint import array_files, manifest

ROOT = Path(__file__).parents[1]
RUN = (
    "--config=configs/debug.py",
    "--config.model.repeats=1",
    "--config.model.prefix=()",
    "--config.train.steps=40",
    "--config.checkpoint.every=4",
    "--config.log.every=1",
    "--config.eval.every=10",
    "--config.eval.batches=1",
    "--config.eval.final_batches=1",
    "--config.eval.sample_tokens=0",
    "--config.log.tensorboard=False",
    "--config.limits.heartbeat=3",
)
EVERY = 4  # steps between checkpoints, as above
PATIENCE = 600  # seconds for a start to end


def start(workdir: Path, processes: int) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of the run, with two simulated devices in all."""
    words = [sys.executable, "-m", "moe_jax.main", *RUN, f"--workdir={workdir}"]
    words += ["--config.mesh.data=2", "--config.mesh.expert=1", "--config.mesh.model=1"]
    words += [f"--config.simulate_devices={2 // processes}"]
    joined = [[] for _ in range(processes)]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        joined = [
            [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
            for i in range(processes)
        ]
    log = workdir.with_suffix(".log").open("ab")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log:
        return [
            subprocess.Popen([*words, *own], cwd=ROOT, stdout=log, stderr=log, env=environment)
            for own in joined
        ]


def rows_of(workdir: Path) -> dict[int, tuple[str, ...]]:
    """Returns what was logged of each step, its floats with all their bits."""
    rows: dict[int, tuple[str, ...]] = {}
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a kill tore it
        if "train/loss" in row:
            names = ("train/loss", "train/grad_norm", "train/param_norm")
            rows[row["step"]] = tuple(float(row[name]).hex() for name in names)
    return rows


def arrays_of(workdir: Path) -> dict[str, bytes]:
    """Returns the bytes of every array of the newest checkpoint."""
    path = sorted((workdir / "checkpoints").glob("step_????????"))[-1]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=here)
        for name, (shape, dtype) in manifest.read(path)["arrays"].items()
    }
    loaded = array_files.load_arrays(path, wanted)
    return {name: np.asarray(array).tobytes() for name, array in loaded.items()}


def finish(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(timeout=PATIENCE) for process in processes]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM"))
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    chance = random.Random(flags.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_loop_"))
    whole, killed = folder / "whole", folder / "killed"

    begun = time.monotonic()
    length = 0.0
    # The first run compiles; the second, which finds its programs, is as long as those to come.
    for workdir in (whole, folder / "warm"):
        since = time.monotonic()
        codes = finish(start(workdir, flags.processes))
        assert codes == [0] * flags.processes, (codes, workdir.with_suffix(".log").read_text())
        length = time.monotonic() - since

    kills, runs, most_redone = 0, 1, 0
    # Signals sent, and processes that SIGTERM ended before Python listened: there was no run yet.
    sent, unborn = 0, 0
    while kills < flags.kills:
        before = max(rows_of(killed), default=0)
        processes = start(killed, flags.processes)
        time.sleep(chance.uniform(0.0, length))
        alive = [process for process in processes if process.poll() is None]
        if not alive:  # it reached its end: begin a new one
            assert [p.returncode for p in processes] == [0] * flags.processes
            assert rows_of(killed) == rows_of(whole), "the losses differ"
            killed, runs = folder / f"killed_{runs}", runs + 1
            continue
        for process in chance.sample(alive, chance.randint(1, len(alive))):
            process.send_signal(signal.Signals[f"SIG{flags.signal}"])
            sent += 1
        codes = finish(processes)
        kills += 1
        if flags.signal == "TERM":
            # A process that ends before Python listens is ended by the system, by -15.
            assert all(code in (0, 143, -15) for code in codes), codes
            unborn += codes.count(-15)
        reached = max(rows_of(killed), default=0)
        saved = [int(p.parent.name[5:13]) for p in (killed / "checkpoints").glob("*/moe_jax.json")]
        again = max(reached, before) - max(saved, default=0)
        most_redone = max(most_redone, again)
        print(f"kill {kills}: at step {reached}, {again} steps to be made again", flush=True)
    codes = finish(start(killed, flags.processes))
    assert codes == [0] * flags.processes, (codes, killed.with_suffix(".log").read_text())
    heard = sum(
        path.read_text(errors="replace").count("SIGTERM: ") for path in folder.glob("*.log")
    )
    same_rows = rows_of(killed) == rows_of(whole)
    same_arrays = arrays_of(killed) == arrays_of(whole)
    what = f"{kills} times SIG{flags.signal} to {flags.processes} process(es), {heard} heard"
    if unborn:
        what += f", {unborn} before Python listened"
    rows, arrays = ("equal" if same else "DIFFER" for same in (same_rows, same_arrays))
    print(
        f"{what}: losses and norms of {len(rows_of(whole))} steps {rows}, arrays of the last "
        f"checkpoint {arrays}; at most {most_redone} steps made "
        f"again after a kill (a save every {EVERY}), {time.monotonic() - begun:.0f} s"
    )
    all_heard = flags.signal == "KILL" or heard + unborn >= sent
    return 0 if same_rows and same_arrays and all_heard else 1


if __name__ == "__main__":
    sys.exit(main())
