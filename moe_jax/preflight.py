"""`--preflight`: looks at every process of a run before an hour of a cluster is spent on it.

Nothing is trained. Every process reports its host, software, devices, clock, disk and whether it
can write to the workdir; then every collective that the layers use runs once on every axis of the
mesh that is longer than one, and its result is compared with what it must be.

The bandwidth of a collective is the bytes that one device gives to it, by the time of the fastest
of a few calls. It is a figure to compare machines with, not that of a link.
"""

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from rich.console import Group
from rich.filesize import decimal

from moe_jax import exit_codes
from moe_jax.models.functions import make_model
from moe_jax.parallel import mesh
from moe_jax.parallel.mesh import P
from moe_jax.runtime import agreement, cluster
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS
from moe_jax.terminal.table import Table, names, numbers, prose
from moe_jax.train_step import initial

# float32 numbers that each device gives to a collective: 1 MiB.
COLUMNS = 1 << 18
# Calls of a collective, of which the fastest counts.
CALLS = 5
# Seconds between two clocks, from which on they are said to differ.
SKEW = 2.0


class Report(NamedTuple):
    """Holds what the processes and the collectives said."""

    processes: list[dict[str, Any]]
    collectives: list["Collective"]
    # One line each; none = the run may begin.
    faults: list[str]
    # The exit code.
    code: int


class Collective(NamedTuple):
    """One collective on one axis."""

    axis: str
    name: str
    right: bool
    seconds: float
    # That one device gave.
    bytes: int

    @property
    def bandwidth(self) -> float:
        """Returns the bytes per second and device."""
        return self.bytes / self.seconds


def run(cfg: Config, workdir: Path, versions: Mapping[str, str]) -> Report:
    """Looks at all processes; to be called by each of them. Under the mesh of the config.

    Args:
      versions: of the code and the libraries, by name.
    """
    # Old checkpoints are deleted when a new one is whole, so for a while there is one more.
    need = checkpoint_bytes(cfg) * (cfg.checkpoint.keep + 1)
    own = describe(cfg, workdir, need, versions)
    processes = agreement.gather("preflight", own, cfg.limits.other or 1e6)
    collectives = measure()
    faults, code = judge(processes, collectives)
    return Report(processes, collectives, faults, code)


def checkpoint_bytes(cfg: Config) -> int:
    """Returns the bytes of one checkpoint of the run."""
    init = initial(cfg, make_model(cfg.model))
    state = jax.eval_shape(init, jax.random.key(cfg.seed))
    # Keys of random numbers have a dtype of their own and no size in bytes.
    arrays = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.number)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


def describe(cfg: Config, workdir: Path, need: int, versions: Mapping[str, str]) -> dict[str, Any]:
    """Returns what this process says of itself; `need` bytes are wanted on its disk."""
    fault = writing_fault(workdir)
    free = shutil.disk_usage(existing_parent(workdir)).free
    if not fault and free < need:
        fault = f"{decimal(free)} free below {workdir}, and {decimal(need)} are needed"
    devices = jax.local_devices()
    data = TASKS[cfg.task].open(cfg)
    # All read their clocks at the same moment, after whatever took them long.
    if cluster.PEERS.started:
        cluster.PEERS.meet("clocks", cfg.limits.other or 1e6)
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "free": free,
        "data": data.fingerprint[:12],
        "versions": {**versions, "system": platform.machine()},
        "fault": fault,
    }


def writing_fault(workdir: Path) -> str:
    """Returns why this process cannot write to the workdir; "" when it can."""
    probe = workdir / f".preflight_{jax.process_index()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"written by --preflight")
        # A disk that is full may say so only here.
        with probe.open("rb") as file:
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        return f"{workdir} cannot be written to: {error.strerror}"
    return ""


def existing_parent(path: Path) -> Path:
    """Returns the nearest directory above a path that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


# Collectives


class Kind(NamedTuple):
    """A collective, and what it must give to each device.

    Both take x [N, C]: row i is what device i of the axis gives.
    """

    # (the row [1, C] of a device, axis) -> its result.
    call: Callable[[jax.Array, str], jax.Array]
    # x -> [N, ...], one row for each device.
    wanted: Callable[[np.ndarray], np.ndarray]


def _reduce_scatter(x: jax.Array, axis: str) -> jax.Array:
    return lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True)


def _all_to_all(x: jax.Array, axis: str) -> jax.Array:
    return lax.all_to_all(x, axis, split_axis=1, concat_axis=1, tiled=True)


def _all_gather(x: jax.Array, axis: str) -> jax.Array:
    return lax.all_gather(x, axis, axis=1, tiled=True)


def _permute(x: jax.Array, axis: str) -> jax.Array:
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _wanted_sum(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x.sum(0), x.shape)


def _wanted_scattered(x: np.ndarray) -> np.ndarray:
    return x.sum(0).reshape(len(x), -1)


def _wanted_gathered(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x.reshape(-1), (len(x), x.size))


def _wanted_exchanged(x: np.ndarray) -> np.ndarray:
    parts = x.reshape(len(x), len(x), -1)
    return parts.swapaxes(0, 1).reshape(x.shape)


def _wanted_permuted(x: np.ndarray) -> np.ndarray:
    return np.roll(x, 1, axis=0)


KINDS = {
    "all-reduce": Kind(lax.psum, _wanted_sum),
    "reduce-scatter": Kind(_reduce_scatter, _wanted_scattered),
    "all-gather": Kind(_all_gather, _wanted_gathered),
    "all-to-all": Kind(_all_to_all, _wanted_exchanged),
    "permute": Kind(_permute, _wanted_permuted),
}


def measure() -> list[Collective]:
    """Runs every collective on every axis of the mesh that is longer than one."""
    lengths = mesh.of(jax.sharding.get_mesh())
    axes = [axis for axis, length in lengths._asdict().items() if length > 1]
    return [measure_one(axis, name) for axis in axes for name in KINDS]


def measure_one(axis: str, name: str) -> Collective:
    """Runs one collective on one axis, and compares its result on the devices of this process."""
    kind, here = KINDS[name], jax.sharding.get_mesh()
    length = here.shape[axis]
    # Small whole numbers, whose sums are exact. The columns can be parted among the devices.
    columns = COLUMNS // length * length
    given = (np.arange(length * columns, dtype=np.float32) % 7).reshape(length, columns)
    sharding = NamedSharding(here, P(axis))
    x = jax.make_array_from_callback(given.shape, sharding, lambda index: given[index])

    def on_device(row: jax.Array) -> jax.Array:
        return kind.call(row, axis)

    # The result of a sum is the same everywhere, which the check of varying axes would refuse.
    call = jax.jit(
        jax.shard_map(on_device, mesh=here, in_specs=P(axis), out_specs=P(axis), check_vma=False)
    )
    seconds, result = [], x
    # The first call compiles, and does not count.
    for _ in range(1 + CALLS):
        begun = time.monotonic()
        result = jax.block_until_ready(call(x))
        seconds.append(time.monotonic() - begun)
    # Each process looks at the results of its own devices.
    wanted = kind.wanted(given)
    right = all(
        np.array_equal(np.asarray(shard.data), wanted[shard.index])
        for shard in result.addressable_shards
    )
    return Collective(axis, name, right, min(seconds[1:]), columns * 4)


# Verdict


def judge(processes: list[dict[str, Any]], collectives: list[Collective]) -> tuple[list[str], int]:
    """Returns what is wrong, and the exit code."""
    first = processes[0]
    drift, own, late = [], [], []
    for number, said in enumerate(processes):
        # Other data or other code: the run would not be one run.
        for key in ("data", "versions"):
            if said[key] != first[key]:
                drift.append(f"process {number}: {key} {said[key]}, and {first[key]} in process 0")
        # What a process has found of itself.
        if said["fault"]:
            own.append(f"process {number}: {said['fault']}")
        off = said["time"] - first["time"]
        if abs(off) > SKEW:
            late.append(f"process {number}: its clock is {off:+.1f} s off that of process 0")
    wrong = [f"{c.name} over {c.axis} gives a wrong result" for c in collectives if not c.right]
    if drift:
        code = exit_codes.DRIFT
    elif own:
        code = exit_codes.CONFIG
    else:
        code = exit_codes.RETRY if wrong else exit_codes.DONE
    # A clock that is off is told, and stops nothing: no step depends on it.
    return [*drift, *own, *wrong, *late], code


def render(report: Report) -> Group:
    """Returns the tables and the verdict, to be printed."""
    processes = Table(
        [*numbers("process"), *names("host"), *prose("devices"), *numbers("clock s", "disk free")]
        + [*names("data"), *prose("state")],
        title="Processes",
    )
    first = report.processes[0]
    for number, said in enumerate(report.processes):
        processes.add(
            str(number),
            said["host"],
            said["devices"],
            f"{said['time'] - first['time']:+.2f}",
            decimal(said["free"]),
            said["data"],
            said["fault"] or "fine",
        )
    collectives = Table(
        [*names("axis", "collective"), *numbers("ms", "GB/s"), *names("result")],
        title="Collectives",
        keys=2,
    )
    for c in report.collectives:
        collectives.add(
            c.axis,
            c.name,
            f"{c.seconds * 1e3:.2f}",
            f"{c.bandwidth / 1e9:.2f}",
            "right" if c.right else "WRONG",
        )
    versions = "  ".join(f"{name} {value}" for name, value in first["versions"].items())
    verdict = "\n".join(report.faults) or "nothing was found that would stop this run"
    shown = [processes, "", collectives, ""] if report.collectives else [processes, ""]
    return Group(*shown, versions, verdict)
