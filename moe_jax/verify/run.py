"""The whole proof: one device as the reference, then every layout and mesh against it."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.parallel.mesh import ONE, Lengths
from moe_jax.train_step import State
from moe_jax.verify import alone, compare, processes, shrink, states
from moe_jax.verify.compare import Deviation, Rounded
from moe_jax.verify.program import Probe, Program

ROUNDED_STEPS = 20
FIRST_VALUES = 1e-12
# Every way to write 8 as data x expert x model.
ALL = [
    lengths
    for data, expert, model in itertools.product((1, 2, 4, 8), repeat=3)
    if (lengths := Lengths(data=data, expert=expert, model=model)).num_devices == shrink.DEVICES
]
# What some models cannot have: rows that are split over `seq`, alone and beside two other axes at
# a time, and pipelines.
SOME = [
    Lengths(seq=8),
    Lengths(data=2, expert=2, seq=2),
    Lengths(expert=2, seq=2, model=2),
    Lengths(stage=2, data=2, expert=2),
    Lengths(stage=2, expert=2, model=2),
]
# Devices that are simulated at most: one mesh with all five axes longer than one.
MOST_DEVICES = 32


class Reference(NamedTuple):
    """One device, one large batch, a loop over the layers, nothing rematerialised."""

    program: Program
    begin: State
    # Of the steps, and of one with `Program.tied` routers.
    probes: list[Probe]
    # By name, after the steps.
    end: dict[str, np.ndarray]


class Row(NamedTuple):
    """One layout on one mesh beside the reference."""

    name: str
    # By which rule of the config; "" = it ran.
    refused: str
    # The error that stopped it; "" = none.
    failure: str
    deviations: dict[str, Deviation]
    # The first beyond its limit.
    first: Deviation | None
    # The mesh that read the checkpoint written here; "" = none was written.
    reader: str
    # Arrays that differ in a bit after that.
    unequal: list[str]
    # In float32; None = not asked for on this mesh.
    rounded: Rounded | None

    @property
    def sound(self) -> bool:
        return not (self.failure or self.first or self.unequal)


class Result(NamedTuple):
    rules: list[shrink.Rule]
    alone: list[alone.Check]
    rows: list[Row]
    steps: int
    # Of meshes that the config refuses as it is, and not as it was shrunk.
    notes: list[str]

    @property
    def proven(self) -> bool:
        return all(check.sound for check in self.alone) and all(row.sound for row in self.rows)


def empty(name: str, refused: str = "", failure: str = "") -> Row:
    """Returns the row of a layout that gave no figures."""
    return Row(name, refused, failure, {}, None, "", [], None)


class Wanted(NamedTuple):
    """Holds what a config is to be proven on."""

    meshes: Sequence[Lengths]
    steps: int
    # More than 1: also on as many real ones.
    processes: int
    # On every mesh, not only on the one with the most axes.
    float32: bool


def prove(raw: Mapping[str, Any], wanted: Wanted, say: Callable[[str], None]) -> Result:
    """Does as `verify` in a process of its own: simulates the devices, in float64, keeps no files.

    It comes before anything else of the process that uses jax. jax_enable_x64 stays on. Raises
    UserError for a mesh of more than MOST_DEVICES.
    """
    for lengths in wanted.meshes:
        if lengths.num_devices > MOST_DEVICES:
            raise UserError(
                f"the mesh {lengths} has more than {MOST_DEVICES} devices, as many as are "
                "simulated here at most: name a smaller one"
            )
    mesh.simulate(max([shrink.DEVICES, *(lengths.num_devices for lengths in wanted.meshes)]))
    jax.config.update("jax_enable_x64", True)
    with tempfile.TemporaryDirectory(prefix="moe_jax_verify_") as folder:
        return verify(raw, wanted, Path(folder), say)


def verify(
    raw: Mapping[str, Any], wanted: Wanted, folder: Path, say: Callable[[str], None]
) -> Result:
    """Proves a config (a nested dict) on meshes of simulated devices.

    `folder` is an empty directory for checkpoints; `say` is told what is being done. Raises
    UserError for a config that is refused by its rules, on one device or on every mesh.
    """
    small, rules = shrink.shrink(raw)
    refusals = [shrink.refusal(small, lengths) for lengths in wanted.meshes]
    if all(refusals):
        raise UserError(
            f"every mesh is refused for the config as it was shrunk (docs/verify.md): {refusals[0]}"
        )
    most_split = widest(small, wanted.meshes)
    if most_split.num_devices % wanted.processes:
        raise UserError(
            f"--processes {wanted.processes} cannot share the {most_split.num_devices} devices of "
            f"the mesh {most_split} evenly: name a mesh of a multiple of {wanted.processes} devices"
        )
    say("one device")
    one = reference(small, wanted.steps)
    states.write(one.program, one.begin, folder / "begin")
    rows = list(_rows(small, one, wanted, folder, say))
    if wanted.processes > 1:
        say(f"{wanted.processes} processes")
        rows.append(_processes(small, one, most_split, wanted.processes, folder))
    say("masks, causality, plain arithmetic")
    plain = shrink.plain(small)
    # A pipeline has stacked layers and micro-batches, and no plain form.
    wide = Program(small if shrink.refusal(plain, most_split) else plain, most_split)
    checks = [
        first_values(one, wide),
        evaluated(one, wide, states.read(wide, folder / "begin")),
        *alone.checks(one.program, one.begin),
        alone.attention(raw["data"]["seq_len"], one.program.cfg.model),
    ]
    if "counts" in one.probes[0].sums:
        # Without the last one, whose routers are tied: there whole experts serve nobody.
        probes = one.probes[:-1]
        checks.append(alone.served(probes, small["model"]["moe"]["num_experts"]))
    return Result(rules, checks, rows, wanted.steps, unlike(raw, small, wanted.meshes))


def reference(small: Mapping[str, Any], steps: int) -> Reference:
    """Runs the steps of the reference."""
    program = Program(shrink.plain(small), ONE).compile()
    begin = program.initial()
    end, probes = program.steps(begin, steps)
    return Reference(program, begin, [*probes, program.tied(begin)], states.named(program, end))


def against(
    one: Reference, program: Program, begin: State
) -> tuple[State, dict[str, Deviation], Deviation | None]:
    """Runs the steps of a compiled program beside the reference's.

    Returns the last state, the worst deviations, and the first beyond its limit.
    """
    # The last probe of the reference is that of tied routers.
    end, probes = program.steps(begin, len(one.probes) - 1)
    probes = [*probes, program.tied(begin)]
    worst, first = compare.deviations(one.probes, probes, one.end, states.named(program, end))
    return end, worst, first


def first_values(one: Reference, program: Program) -> alone.Check:
    """Checks that the mesh of `program` draws the same first parameters as one device."""
    want, have = states.named(one.program, one.begin), states.named(program, program.initial())
    name, worst = compare.largest({name: compare.far(want[name], have[name]) for name in want})
    claim = f"{program.lengths} draws the same first values"
    return alone.Check(claim, worst, FIRST_VALUES, name if worst else "", True)


def evaluated(one: Reference, program: Program, begin: State) -> alone.Check:
    """Checks that an evaluation on the mesh of `program` has the losses and the load of one
    device's.

    `begin` is the state on that mesh.
    """
    want, have = one.program.evaluate(one.begin), program.evaluate(begin)
    scaled = {
        name: compare.far(want[name], have[name], np.maximum(np.abs(want[name]), 1))
        for name in want
    }
    name, worst = compare.largest(scaled)
    claim = f"{program.lengths} evaluates the same"
    return alone.Check(claim, worst, alone.LIMIT, name if worst else "", True)


def default_meshes(raw: Mapping[str, Any]) -> list[Lengths]:
    """Returns the meshes of 8 devices on which a config is proven: all of three axes, and of SOME
    those that its rules accept.
    """
    small, _ = shrink.shrink(raw)
    return [*ALL, *(lengths for lengths in SOME if not shrink.refusal(small, lengths))]


def unlike(
    raw: Mapping[str, Any], small: Mapping[str, Any], meshes: Sequence[Lengths]
) -> list[str]:
    """Returns a line for each mesh that the config refuses as it is, and not as it was shrunk."""
    lines = []
    for lengths in meshes:
        reason = shrink.refusal(raw, lengths)
        if reason and not shrink.refusal(small, lengths):
            lines.append(
                f"{lengths}: the config as it is refuses this mesh ({reason}); this row is of the "
                "shrunk one"
            )
    return lines


def widest(small: Mapping[str, Any], meshes: Sequence[Lengths]) -> Lengths:
    """Returns the mesh that splits the most, of those that are not refused."""
    accepted = [lengths for lengths in meshes if not shrink.refusal(small, lengths)]
    # Of equal ones the first that was asked for.
    return max(accepted, key=lambda lengths: sum(length > 1 for length in lengths))


class _Job(NamedTuple):
    name: str
    lengths: Lengths
    refused: str
    # In float64, and in float32 if that is asked for.
    programs: list[Future[Program]]


def _rows(
    small: Mapping[str, Any],
    one: Reference,
    wanted: Wanted,
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """Yields the rows of all layouts and meshes, which are compiled while others run."""
    layout, names = shrink.layout(small)
    narrow = {"model.dtype": "float32", "model.param_dtype": "float32"}
    in_float32 = list(wanted.meshes) if wanted.float32 else [widest(small, wanted.meshes)]
    # XLA compiles outside of Python's lock, so two threads keep two cores busy; a third runs what
    # they have compiled.
    with ThreadPoolExecutor(2) as compiling, ThreadPoolExecutor(1) as running:
        # One device in float32: what the float32 runs of meshes are held beside.
        rounded = _submit(compiling, "float32", ONE, [shrink.changed(shrink.plain(small), narrow)])
        jobs = [_submit(compiling, f"1x1x1 {'+'.join(names)}", ONE, [layout])]
        for lengths in wanted.meshes:
            raws = [small]
            if lengths in in_float32:
                raws.append(shrink.changed(small, narrow))
            jobs.append(_submit(compiling, str(lengths), lengths, raws))
        want = _narrow(rounded.programs[0].result(), one.begin)
        # Each checkpoint is read on the mesh before its own; the first one on the reference.
        readers = [one.program]
        while jobs:
            # Taken out of the list, so that a program is freed once it has run.
            job = jobs.pop(0)
            say(job.name)
            # In the third thread, while the two others compile.
            row = running.submit(_row, job, one, want, readers, folder)
            # Whatever a layout raises while it is traced, compiled or run is a result: jax's checks
            # of sharding are faults found.
            error = row.exception()
            if error:
                yield empty(job.name, failure=f"fails: {line_of(error)}")
            else:
                yield row.result()


def _submit(
    pool: ThreadPoolExecutor, name: str, lengths: Lengths, raws: Sequence[Mapping[str, Any]]
) -> _Job:
    """Begins to compile programs of one mesh in `pool`, unless the config refuses it."""
    refused = shrink.refusal(raws[0], lengths)

    def build(raw):
        return Program(raw, lengths).compile()

    programs = [] if refused else [pool.submit(build, raw) for raw in raws]
    return _Job(name, lengths, refused, programs)


def _row(job: _Job, one: Reference, want: list[Probe], readers: list[Program], folder: Path) -> Row:
    """Runs one layout; its checkpoint is read on the mesh before it, of which `readers` keeps the
    last.
    """
    if job.refused:
        return empty(job.name, job.refused)
    program, reader = job.programs[0].result(), readers[-1]
    # One begin for all: other first values on a mesh are a check of their own.
    begin = states.read(program, folder / "begin")
    end, worst, first = against(one, program, begin)
    unequal = states.unequal(program, end, reader, folder / job.name.replace(" ", "_"))
    readers[:] = [program]
    rounded = None
    if len(job.programs) > 1:
        rounded = compare.rounded(want, _narrow(job.programs[1].result(), begin))
    return Row(job.name, "", "", worst, first, str(reader.lengths), unequal, rounded)


def _narrow(program: Program, begin: State) -> list[Probe]:
    """Returns the probes of a float32 run from the rounded state of a float64 one."""
    rounded = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, begin)
    return program.steps(rounded, ROUNDED_STEPS)[1]


def _processes(
    small: Mapping[str, Any], one: Reference, lengths: Lengths, count: int, folder: Path
) -> Row:
    """Runs a mesh as several processes, and compares what they report."""
    name = f"{lengths}, {count} processes"
    report = processes.run(small, lengths, count, len(one.probes) - 1, folder)
    if isinstance(report, str):
        return empty(name, failure=report)
    worst, first = compare.deviations(one.probes, report.probes, one.end, report.end)
    saved = states.named(one.program, states.read(one.program, folder / processes.SAVED))
    # The checkpoint that the processes wrote together is read on one device.
    return Row(name, "", "", worst, first, str(ONE), states.differ(report.end, saved), None)


def line_of(error: BaseException) -> str:
    """Returns the text of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
