"""The mesh, its axes and their lengths, and the one table that maps logical dimension names to
mesh axes.

    axis     what is split over it
    stage    layers: the stages of a pipeline
    data     rows of the batch; dense parameters (FSDP); the embed dimension of expert weights
    expert   rows of the batch; experts; dense parameters (FSDP)
    seq      tokens of a row (context parallelism, parallel/context.py); experts; dense parameters
             (FSDP)
    model    heads, hidden columns, vocabulary (tensor parallelism)

All five axes are always there, so no spec has a conditional. Dense parameters are FSDP over data,
expert *and* seq: over data alone they would be replicated on every expert shard, and the gradient's
reduce-scatter would become an all-reduce.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError

BATCH = ("data", "expert")
FSDP = (*BATCH, "seq")
# The name of a dimension in RULES.
RANK = "rank"
# The axes that three numbers name: 2x2x2.
WRITTEN = ("data", "expert", "model")


class Lengths(NamedTuple):
    """The length of every axis; in a config that is not built yet, -1 for the devices left over.

    `str` and `parse` write and read DATAxEXPERTxMODEL, as in 2x2x2, and all five axes where stage
    or seq is longer than 1: STAGExDATAxEXPERTxSEQxMODEL, as in 2x2x2x1x1.
    """

    stage: int = 1
    data: int = 1
    expert: int = 1
    seq: int = 1
    model: int = 1

    @property
    def num_devices(self) -> int:
        return math.prod(self)

    @property
    def batch_devices(self) -> int:
        """Returns the number of devices among which the rows of a batch are split."""
        return self.data * self.expert

    @property
    def fsdp_devices(self) -> int:
        """Returns the number of devices among which a dense parameter is split."""
        return self.batch_devices * self.seq

    def written(self) -> dict[str, int]:
        """Returns the lengths that a config's mesh block has, by its keys."""
        return self._asdict()

    def split(self) -> str:
        """Returns the axes that split something, as in "data 2 x expert 4"; "" for one device."""
        parts = [f"{axis} {length}" for axis, length in self._asdict().items() if length > 1]
        return " x ".join(parts)

    def __str__(self) -> str:
        names = WRITTEN if self.stage == self.seq == 1 else self._fields
        return "x".join(str(getattr(self, name)) for name in names)


AXES = Lengths._fields
# One device.
ONE = Lengths()

# Which axes of the mesh split a dimension of that name.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": BATCH,
    # The model width of dense parameters.
    "embed": FSDP,
    # The inner width of two matrices in a row, which may be shorter than that (`dividing`).
    RANK: FSDP,
    "experts": ("expert", "seq"),
    # The tokens of a row.
    "sequence": "seq",
    # The model width of expert weights, whose experts already use the expert axis.
    "expert_embed": "data",
    "hidden": "model",
    "heads": "model",
    "vocab": "model",
}


def simulate(devices: int) -> None:
    """Simulates CPU devices in this process. To be called before jax looks for devices.

    Two cores give two threads, and the collectives of more devices than threads deadlock: hence
    PJRT_NPROC, which jax reads when it looks. For one device it would only be slower (1.3 times the
    step: 64 threads take turns on two cores), so nothing else sets it.
    """
    os.environ.setdefault("PJRT_NPROC", "64")
    for name, value in (("jax_platforms", "cpu"), ("jax_num_cpu_devices", devices)):
        # Once jax has looked for devices, only the same value may be set again.
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


def parse(text: str, flag: str) -> Lengths:
    """Returns the lengths of "2x2x2" (data, expert, model) or of all five axes, "1x2x2x2x1".

    Raises UserError, which names the flag.
    """
    # What is no number becomes 0, which no axis may have.
    lengths = [int(n) if n.isdecimal() else 0 for n in text.split("x")]
    if len(lengths) not in (len(WRITTEN), len(AXES)) or 0 in lengths:
        raise UserError(
            f"{flag} {text}: write DATAxEXPERTxMODEL, as in 2x2x2, or "
            "STAGExDATAxEXPERTxSEQxMODEL, as in 1x2x2x2x1"
        )
    names = WRITTEN if len(lengths) == len(WRITTEN) else AXES
    return Lengths(**dict(zip(names, lengths, strict=True)))


def of(mesh: Mesh) -> Lengths:
    """Returns the lengths of a mesh that `make` made."""
    return Lengths(**mesh.shape)


def spec(*names: str | None) -> P:
    """Returns the partition of an array from the logical names of its dimensions; refuses two names
    on one mesh axis.
    """
    axes = [RULES[name] for name in names]
    # A dimension may be split over several axes of the mesh.
    flat: list[str] = []
    for axis in axes:
        flat += [axis] if isinstance(axis, str) else axis or ()
    if len(flat) != len(set(flat)):
        raise ValueError(
            f"the dimensions {names} put one mesh axis twice into {axes}: change RULES in "
            "moe_jax/parallel/mesh.py"
        )
    return P(*axes)


def dividing(width: int) -> tuple[str, ...]:
    """Returns the axes of FSDP that can split a width of RANK on the current mesh.

    The width of the model is a multiple of all of them (config/meshes.py). A rank is chosen for its
    own sake, and is split over as many as divide it.
    """
    lengths, axes = dict(jax.sharding.get_abstract_mesh().shape), []
    for axis in FSDP:
        length = lengths.get(axis, 1)
        if length > 1 and width % length == 0:
            axes.append(axis)
            width //= length
    return tuple(axes)


def resolve(lengths: Lengths, num_devices: int) -> Lengths:
    """Returns lengths with -1 filled in: `mesh.data = -1` takes the devices that the other axes
    leave. Raises UserError where they do not make `num_devices`.
    """
    written = lengths.written()
    free = [name for name, length in written.items() if length == -1]
    fixed = math.prod(length for length in written.values() if length != -1)
    if len(free) > 1:
        raise UserError(
            f"mesh.{free[0]} and mesh.{free[1]} are both -1: only one axis can take the rest of "
            "the devices"
        )
    if free and num_devices % fixed == 0:
        return lengths._replace(**{free[0]: num_devices // fixed})
    if fixed != num_devices:
        shown = WRITTEN if lengths.stage == lengths.seq == 1 else AXES
        text = " x ".join(f"mesh.{name} {written[name]}" for name in shown)
        wanted = lengths._replace(**{name: 1 for name in free})
        raise UserError(
            f"{text} does not make {num_devices} devices: change the lengths (the nearest mesh is "
            f"{nearest(wanted, num_devices)}), or set simulate_devices"
        )
    return lengths


def make(
    lengths: Lengths, devices: Sequence[jax.Device] | None = None, slow_axis: str = "data"
) -> Mesh:
    """Returns an Explicit mesh with all five axes, of `devices` or of the first that there are.

    Raises UserError, with the nearest mesh, where these devices cannot make it.
    """
    devices = list(jax.devices()[: lengths.num_devices] if devices is None else devices)
    types = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return Mesh(arranged(lengths, devices, slow_axis), AXES, axis_types=types)


def arranged(lengths: Lengths, devices: Sequence[jax.Device], slow_axis: str) -> np.ndarray:
    """Returns devices in the shape of a mesh, neighbours on its axes near each other.

    A physical axis of a TPU's torus may be split between axes of the mesh. Where the devices are
    several slices, `slow_axis` is the one that crosses the network between them, and every other
    axis lies within a slice.
    """
    slices = num_slices(devices)
    _refuse_impossible(lengths, len(devices), slices, slow_axis)
    if slices == 1:
        return mesh_utils.create_device_mesh(
            tuple(lengths), devices, allow_split_physical_axes=True
        )
    # The mesh is that of the slices times that of the devices of a slice.
    across = [slices if axis == slow_axis else 1 for axis in AXES]
    within = [length // part for length, part in zip(lengths, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Returns how many TPU slices devices are of; 1 for what is no TPU.

    Hosts of GPUs are no slices: their devices come in the order of hosts, so the last axes of a
    mesh lie within a host by themselves.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) for device in devices})


def _refuse_impossible(lengths: Lengths, num_devices: int, slices: int, slow_axis: str) -> None:
    """Raises UserError for a mesh that does not fit the devices, or the slices that they are of."""
    length = getattr(lengths, slow_axis)
    if lengths.num_devices == num_devices and length % slices == 0:
        return
    if lengths.num_devices != num_devices:
        reason = f"makes {lengths.num_devices} devices, and there are {num_devices}"
    else:
        reason = (
            f"has mesh.{slow_axis} = {length}, which {slices} slices do not divide; "
            "mesh_slow_axis names the axis that crosses slices"
        )
    near = nearest(lengths, num_devices, slices, slow_axis)
    way_out = f": the nearest mesh is {near}" if near else ""
    raise UserError(f"the mesh {lengths} {reason}{way_out}")


def nearest(
    lengths: Lengths, num_devices: int, slices: int = 1, slow_axis: str = "data"
) -> Lengths | None:
    """Returns the mesh of so many devices and slices that is least unlike `lengths`.

    Unlike by factors: 4 is as far from 2 as 2 is from 1. None where no mesh fits the slices.
    """

    def unlike(other: Lengths) -> float:
        pairs = zip(lengths, other, strict=True)
        # A length of -1 or 0 asks for nothing: it counts as 1.
        return sum(abs(math.log(max(one, 1) / another)) for one, another in pairs)

    # A stage and a part of a row stay what was asked for, as long as they divide the devices.
    stage, seq = max(lengths.stage, 1), max(lengths.seq, 1)
    if num_devices % (stage * seq):
        stage, seq = 1, 1
    candidates = all_of(num_devices, stage, seq)
    fitting = [found for found in candidates if getattr(found, slow_axis) % slices == 0]
    return min(fitting, key=unlike, default=None)


def all_of(num_devices: int, stage: int = 1, seq: int = 1) -> list[Lengths]:
    """Returns every mesh of so many devices with these lengths of stage and seq."""
    rest = num_devices // (stage * seq)
    divisors = [n for n in range(1, rest + 1) if rest % n == 0]
    meshes = []
    for expert in divisors:
        for model in divisors:
            # What both leave is the axis `data`.
            if rest % (expert * model) == 0:
                meshes.append(Lengths(stage, rest // (expert * model), expert, seq, model))
    return meshes


def of_host() -> Mesh:
    """Returns a mesh of one device whose memory is that of the host, for what computes nothing; of
    the first device where jax has no CPU (JAX_PLATFORMS).
    """
    try:
        devices = jax.devices("cpu")
    except RuntimeError:
        devices = jax.devices()
    return make(ONE, devices[:1])


def sharding(*names: str | None) -> NamedSharding:
    """Returns the sharding of `spec` on the mesh that `jax.set_mesh` made current."""
    mesh = jax.sharding.get_mesh()
    return NamedSharding(mesh, spec(*names))
