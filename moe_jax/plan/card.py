"""The resource card of a config, of `--dry_run` and `python -m moe_jax plan`: parameters, FLOPs,
memory, traffic and time, before anything is allocated.

Counts and shards are exact, the compiler's figures are those of the step that training runs, for
the platform of these devices. What is an estimate says so. Everything is abstract: the card costs
the compilation and no memory, and the devices of the mesh need not be there. card_tables.py shows
it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from moe_jax import train_step
from moe_jax.parallel import chip_flags
from moe_jax.parallel.mesh import Lengths, of
from moe_jax.pipeline import schedule
from moe_jax.pipeline.schedule import Schedule
from moe_jax.plan import chips, dispatch, estimate, flops, memory_theory, network, theory, work
from moe_jax.plan.abstract import shard_bytes
from moe_jax.plan.chips import Chip
from moe_jax.plan.compiling import abstract_state, compile_step
from moe_jax.plan.dispatch import Dispatch
from moe_jax.plan.estimate import Estimate
from moe_jax.plan.hlo import program
from moe_jax.plan.hlo.program import Program
from moe_jax.plan.theory import Expected
from moe_jax.plan.work import Work
from moe_jax.schema.config import Config


class Memory(NamedTuple):
    """Bytes on one device, from the shardings; every device holds as much."""

    parameters: int
    # As many as the parameters, within the compiler's `temporary`.
    gradients: int
    optimizer: int
    ema: int
    # The copy in float32 of optim.master_copy.
    master: int


class Compiled(NamedTuple):
    """Bytes of the compiled train step on one device, and seconds that compiling it took."""

    argument: int
    output: int
    # Of the output: written over a donated argument.
    alias: int
    # Gradients, activations and buffers, for as long as the step runs.
    temporary: int
    # Seconds of tracing and lowering, and of the compiler.
    lower_seconds: float
    seconds: float
    program: Program

    @property
    def peak(self) -> int:
        """Returns the most bytes that are taken at once, as the compiler plans it."""
        return self.argument + self.output - self.alias + self.temporary


class Card(NamedTuple):
    """All that is shown of a config before it runs."""

    platform: str
    mesh: Lengths
    # Dense ones and MoE ones.
    num_layers: tuple[int, int]
    batch_size: int
    seq_len: int
    num_micro_batches: int
    # None without a pipeline; and the name of its schedule, "" likewise.
    pipeline: Schedule | None
    pipeline_schedule: str
    parameters: flops.Counts
    # FLOPs per token.
    forward: flops.Breakdown
    # FLOPs of a training step, per token and whole.
    train_per_token: int
    train_per_step: int
    memory: Memory
    dispatcher: str
    # None without MoE layers.
    dispatch: Dispatch | None
    compiled: Compiled
    # What published figures there are of a device; None for a CPU, and for chips unknown.
    chip: Chip | None
    # Flags of the compiler.
    flags: Mapping[str, Any]
    work: tuple[Work, ...]
    expected: tuple[Expected, ...]
    # Bytes of the memory traffic of a step, as plan --search estimates it (memory_theory.py); 0
    # where it does not know.
    expected_traffic: int
    # None where the chip is unknown, or has no peak for the dtype.
    estimate: Estimate | None

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def peak_logged(self) -> int:
        """Returns the most bytes that are taken at once in a logged step: parameters are copied
        before it, so that the update can be measured.
        """
        return self.compiled.peak + self.memory.parameters

    @property
    def fits(self) -> bool | None:
        """Returns whether a logged step fits into the memory of a device; None where that is
        unknown.
        """
        return self.peak_logged <= self.chip.memory if self.chip else None


def card(cfg: Config) -> Card:
    """Returns the card of a config on the current mesh.

    Compiles the train step once; allocates nothing on the devices.
    """
    model, seq_len = cfg.model, cfg.data.seq_len
    mesh = jax.sharding.get_mesh()
    kind = mesh.devices.flat[0].device_kind
    chip = chips.of_kind(kind)
    state = abstract_state(cfg, train_step.make_model(model))
    layer = dispatch.of_layer(cfg) if model.num_moe_layers else None
    platform = mesh.devices.flat[0].platform
    computed = dispatch.rows_computed(cfg, platform) if layer else None
    rows, rounds = computed or (None, None)
    compiled = _compiled(cfg, rounds)
    held, balanced = (layer.rows_held, layer.rows_balanced) if layer else (1, 1)
    done = tuple(work.compare(cfg, compiled.program, held, balanced, rows))
    has_peak = chip is not None and cfg.model.dtype in chip.peak
    train_per_token = flops.train_per_token(model, seq_len)
    return Card(
        platform=kind,
        mesh=of(mesh),
        num_layers=(model.num_dense_layers, model.num_moe_layers),
        batch_size=cfg.train.batch_size,
        seq_len=seq_len,
        num_micro_batches=cfg.train.num_micro_batches,
        pipeline=schedule.of(cfg) if cfg.mesh.stage > 1 else None,
        pipeline_schedule=cfg.train.pipeline_schedule if cfg.mesh.stage > 1 else "",
        parameters=flops.parameters(model),
        forward=flops.forward_per_token(model, seq_len),
        train_per_token=train_per_token,
        train_per_step=train_per_token * cfg.train.batch_size * seq_len,
        memory=_memory(state),
        dispatcher=model.moe.dispatcher,
        dispatch=layer,
        compiled=compiled,
        chip=chip,
        flags=chip_flags.of(mesh, cfg.chip_flags),
        work=done,
        expected=tuple(theory.expected(cfg)),
        expected_traffic=memory_theory.memory_traffic(cfg, state, held),
        estimate=estimate.estimate(cfg, compiled.program, done, mesh, chip) if has_peak else None,
    )


def _memory(state: train_step.State) -> Memory:
    """Returns the bytes of the parts of a state on one device."""
    parameters = shard_bytes(state.params)
    return Memory(
        parameters=parameters,
        gradients=parameters,
        optimizer=shard_bytes(state.opt_state),
        ema=shard_bytes(state.ema),
        master=shard_bytes(state.master),
    )


def _compiled(cfg: Config, rounds: program.Rounds | None) -> Compiled:
    """Compiles the train step and returns what the compiler says of it.

    `rounds`: of the loop of the experts' kernel.
    """
    step = compile_step(cfg)
    stats: Any = step.compiled.memory_analysis()
    mesh = jax.sharding.get_mesh()
    domains = network.domains(mesh)
    return Compiled(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        lower_seconds=step.lower_seconds,
        seconds=step.compile_seconds,
        program=program.read(step.compiled.as_text(), dict(mesh.shape), rounds, domains),
    )
