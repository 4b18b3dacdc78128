"""Meshes, rematerialisation and dispatchers that a topology could run a config with, ranked.

All candidates are ranked by a cheap estimate, which compiles nothing: FLOPs by formula, bytes as
theory.py and memory_theory.py expect them, memory by the sizes of what is kept. The best few are
compiled, and ranked again by what the compiler says.

Shapes: T tokens of a device in a micro-batch, D model, V vocabulary, R rows of a dispatch buffer.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.filesize import decimal

from moe_jax import config, train_step
from moe_jax.errors import UserError
from moe_jax.models import mtp
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.parallel import mesh
from moe_jax.pipeline import schedule
from moe_jax.plan import chips, dispatch, flops, memory_theory, network, theory
from moe_jax.plan.abstract import shard_bytes
from moe_jax.plan.card import Card, card
from moe_jax.plan.chips import Chip
from moe_jax.plan.compiling import TooLarge, abstract_state
from moe_jax.plan.hlo.collectives import Collective
from moe_jax.schema.config import Config
from moe_jax.tasks.next_token import chunk_tokens
from moe_jax.terminal.table import Table, names, numbers
from moe_jax.terminal.units import readable

REMATS = ("none", "attention+experts", "dispatch", "dots", "full")
# Dispatchers of assignments, with their options: (name, option, value).
DISPATCHES = (
    ("dropless", "buffer", 0.0),
    ("dropless", "buffer", 1.25),
    ("capacity", "factor", 1.25),
)
# Arrays [T, D] of the compute dtype that a block keeps for its backward pass beside attention's and
# the dispatcher's, by rematerialisation.
KEPT = {"none": 12, "dots": 6, "attention+experts": 1, "dispatch": 1, "full": 1}
# Rows of the estimate that are shown.
SHOWN = 10


class Candidate(NamedTuple):
    """One way to run a config, and what a formula says of it."""

    mesh: mesh.Lengths
    remat: str
    # "" where the model has no MoE layers.
    dispatcher: str
    cfg: Config
    # Of one device.
    memory: int
    flops: float
    received: int
    # Memory traffic, in bytes; 0 where it is not known.
    moved: int
    # 0 where the chip is unknown.
    seconds: float

    @property
    def label(self) -> str:
        parts = [str(self.mesh), f"remat {self.remat}", self.dispatcher]
        return ", ".join(part for part in parts if part)


def rank(raw: Mapping[str, Any], where: str, devices: Sequence[Any]) -> list[Candidate]:
    """Returns the candidates that fit by the estimate, the fastest first.

    `where` is the topology as it was written. Raises UserError where none does.
    """
    chip = chips.of_kind(devices[0].device_kind)
    # The state depends on the mesh alone.
    states: dict[mesh.Lengths, train_step.State] = {}
    programs: set[tuple[Any, ...]] = set()
    found: list[Candidate] = []
    too_large: list[Candidate] = []
    for cfg, name in _configs(raw, len(devices)):
        try:
            made = mesh.make(cfg.mesh, devices, cfg.mesh_slow_axis)
        except UserError:
            continue
        with jax.set_mesh(made):
            # A buffer that has room for the worst case is the one without a limit: one program.
            program = (cfg.mesh, cfg.model.remat, cfg.model.moe.dispatcher, _rows_held(cfg))
            if program in programs:
                continue
            programs.add(program)
            if cfg.mesh not in states:
                states[cfg.mesh] = abstract_state(cfg, train_step.make_model(cfg.model))
            # A dispatcher's buffer and its ways depend on the platform.
            one = _estimated(cfg, name, states[cfg.mesh], made, chip)
        fits = chip is None or one.memory <= chip.memory
        (found if fits else too_large).append(one)
    if not found and not too_large:
        raise UserError(
            f"no mesh of {len(devices)} devices divides this config: its batch, heads, experts and "
            "widths must be multiples of the axes that split them (docs/plan.md)"
        )
    if not found:
        least = min(too_large, key=lambda one: one.memory)
        raise UserError(
            f"nothing fits into {where}: the least is {decimal(least.memory)} a device "
            f"({least.label}); take more devices or fewer rows (train.micro_batch_size)"
        )
    return sorted(found, key=lambda one: (one.seconds, one.flops, one.received))


def _configs(raw: Mapping[str, Any], num_devices: int) -> Iterator[tuple[Config, str]]:
    """Yields every config that the rules allow, with the name of its dispatcher."""
    for lengths in _meshes(raw, num_devices):
        tree = copy.deepcopy(dict(raw))
        tree["mesh"] = lengths.written()
        try:
            first = config.build(tree, num_devices)
        except UserError:
            continue
        for choice in _dispatches(first):
            if choice:
                name, option, value = choice
                tree["model"]["moe"]["dispatcher"] = name
                tree["model"]["moe"]["dispatchers"][name][option] = value
            for remat in REMATS:
                tree["model"]["remat"] = remat
                try:
                    cfg = config.build(tree, num_devices)
                except UserError:
                    continue
                yield cfg, f"{choice[0]} {choice[2]:g}" if choice else ""


def _meshes(raw: Mapping[str, Any], num_devices: int) -> Iterator[mesh.Lengths]:
    """Yields every mesh without stages and with rows that are whole, and those with the stages, and
    the parts of a row, that the config asks for.
    """
    for stage in sorted({1, raw["mesh"]["stage"]}):
        for seq in sorted({1, raw["mesh"]["seq"]}):
            if num_devices % (stage * seq) == 0:
                yield from mesh.all_of(num_devices, stage, seq)


def _dispatches(cfg: Config) -> Sequence[tuple[str, str, float] | None]:
    """Returns the dispatchers to be tried: none of a model without MoE layers, or whose router
    mixes tokens into slots.
    """
    if not cfg.model.num_moe_layers or DISPATCHERS[cfg.model.moe.dispatcher].mixes:
        return (None,)
    return DISPATCHES


def _estimated(
    cfg: Config,
    dispatcher: str,
    state: train_step.State,
    made: jax.sharding.Mesh,
    chip: Chip | None,
) -> Candidate:
    done = _flops(cfg)
    moved = memory_theory.memory_traffic(cfg, state, _rows_held(cfg))
    sent = theory.expected(cfg)
    seconds = 0.0
    if chip:
        on_chip = max(done / chip.peak[cfg.model.dtype], moved / chip.memory_bandwidth)
        # The network is waited for.
        seconds = on_chip + sum(_network_seconds(one, cfg, made, chip) for one in sent)
    return Candidate(
        mesh=cfg.mesh,
        remat=cfg.model.remat,
        dispatcher=dispatcher,
        cfg=cfg,
        memory=_memory(cfg, state),
        flops=done,
        received=sum(one.num_bytes for one in sent),
        moved=moved,
        seconds=seconds,
    )


def _network_seconds(
    one: theory.Expected, cfg: Config, made: jax.sharding.Mesh, chip: Chip
) -> float:
    exchanges = DISPATCHERS[cfg.model.moe.dispatcher].exchanges
    kind = "all-to-all" if one.cargo == "tokens" and exchanges else "all-gather"
    group = len(one.axes.split(" x "))
    whole = Collective(kind, one.axes, group, one.cargo, False, 1, one.num_bytes)
    return network.seconds(whole, made, chip)


def _flops(cfg: Config) -> float:
    """Returns the FLOPs of a device: three passes, a fourth of what blocks compute again, more
    where accumulation or a pipeline needs more forward passes, the rows of the buffer instead of
    those that are useful, and the ticks of a pipeline in which a stage has no work.
    """
    per_token = flops.forward_per_token(cfg.model, cfg.data.seq_len)
    num_tokens = cfg.train.batch_size * cfg.data.seq_len / cfg.mesh.num_devices
    padding = 1.0
    if cfg.model.num_moe_layers:
        padding = _rows_held(cfg) / dispatch.buffer_shape(cfg).own_intended
    model, num_micro = cfg.model, cfg.train.num_micro_batches
    # 1 without a pipeline.
    ticks_per_work = theory.runs(cfg, len) * cfg.mesh.stage / (len(model.blocks) * num_micro)
    blocks = per_token.total - per_token.head + (padding - 1) * per_token.experts
    # Attention's scores alone are computed again where products are kept.
    again = {"none": 0.0, "dots": 0.1}.get(cfg.model.remat, 1.0) * blocks
    if "experts" in cfg.model.remat:
        again -= padding * per_token.experts
    if "attention" in cfg.model.remat:
        again -= per_token.attention_scores
    passes = 2 + theory.forward_passes(cfg)
    in_blocks = ticks_per_work * (passes * blocks + again)
    return num_tokens * (in_blocks + passes * per_token.head)


def _memory(cfg: Config, state: train_step.State) -> int:
    """Returns the bytes of a device: state and gradients exactly, what is kept for the backward
    pass and what a block and the ends of the model hold meanwhile by rules of thumb.
    """
    model, width = cfg.model, jnp.dtype(cfg.model.dtype).itemsize
    parameters = shard_bytes(state.params)
    # Parameters are copied before a logged step.
    fixed = shard_bytes(state) + 2 * parameters
    num_tokens = theory.buffer_tokens(cfg)
    row = num_tokens * model.d_model * width
    heads = num_tokens * 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    attention = heads * width // cfg.mesh.model
    # The output of attention.
    kept_heads = num_tokens * model.num_heads * model.head_dim * width // cfg.mesh.model
    rows = kept_rows = experts_hold = 0
    if model.num_moe_layers:
        held = _rows_held(cfg)
        rows = held * dispatch.row_bytes(cfg)
        # Rows as they come in, and their pre-activations.
        kept_rows = rows - held * model.expert_dim * width
        experts_hold = _held_by_experts(cfg, held, dispatch.buffer_shape(cfg))
    layer = KEPT["none"] * row + attention + rows
    kept = layer
    if model.remat != "none":
        kept = KEPT[model.remat] * row
        kept += attention if model.remat == "dots" else 0
        kept += rows // 2 if model.remat == "dispatch" else 0
        kept += kept_rows if "experts" in model.remat else 0
        kept += kept_heads if "attention" in model.remat else 0
    # Of one block while its gradient is computed.
    step = KEPT["none"] * row + attention + experts_hold
    return fixed + _blocks_at_once(cfg) * kept + _inputs_kept(cfg) * row + step + _held_at_ends(cfg)


def _rows_held(cfg: Config) -> int:
    """Returns the rows of the dispatch buffer of a device, 0 without MoE layers."""
    if not cfg.model.num_moe_layers:
        return 0
    moe = cfg.model.moe
    return DISPATCHERS[moe.dispatcher].rows(dispatch.buffer_shape(cfg), moe.dispatcher_options)


def _blocks_at_once(cfg: Config) -> int:
    """Returns of how many blocks something is kept for the backward pass: a stage of a pipeline
    computes those of one work again from its input.
    """
    model = cfg.model
    if cfg.mesh.stage == 1:
        return len(model.blocks)
    repeats = model.repeats // schedule.of(cfg).round
    return len(model.prefix) + repeats * len(model.period) + len(model.suffix)


def _inputs_kept(cfg: Config) -> int:
    """Returns how many micro-batches, as a block takes them, a stage of a pipeline keeps: inputs of
    its works, and what comes from and goes to the ends of the model.
    """
    if cfg.mesh.stage == 1:
        return 0
    sizes = schedule.of(cfg)
    is_gpipe = cfg.train.pipeline_schedule == schedule.GPIPE
    return (sizes.works if is_gpipe else sizes.in_flight) + 2 * sizes.groups


def _held_by_experts(cfg: Config, held: int, shape: Shape) -> int:
    """Returns the bytes that the experts of one layer hold while their gradients are computed, as
    counted in the program of OLMoE for a v5e.
    """
    model, width = cfg.model, jnp.dtype(cfg.model.dtype).itemsize
    # Of a row: nine arrays as wide as the experts' input, one of them float32, and hidden ones.
    hidden = model.moe.expert_hidden // cfg.mesh.model
    rows = held * ((8 * width + 4) * model.expert_dim + 3 * hidden * width)
    # Tokens of the whole expert axis where they are gathered; the rows of each are added up, and
    # every addend exists twice.
    gathers = not DISPATCHERS[model.moe.dispatcher].exchanges
    num_tokens = shape.num_tokens * (shape.expert_axis if gathers else 1)
    tokens = num_tokens * (2 * shape.per_token + 4) * model.expert_dim * width
    expert = flops.expert(model)
    weights = expert * shape.local_experts // cfg.mesh.model
    # Gathered in several orders, and gradients in float32.
    return rows + tokens + weights * (5 * width + 4)


def _held_at_ends(cfg: Config) -> int:
    """Returns the bytes of logits, and of embedding and head: gathered, and their gradients."""
    model, width = cfg.model, jnp.dtype(cfg.model.dtype).itemsize
    num_tokens = theory.buffer_tokens(cfg)
    chunk = chunk_tokens(model, num_tokens * cfg.mesh.fsdp_devices)
    # With their gradient, in float32; those of further tokens exist beside them.
    num_heads = 1 if chunk else 1 + mtp.num_depths(model)
    logits = 2 * num_heads * (chunk or num_tokens) * model.vocab_size * 4
    ends = model.vocab_size * model.d_model * (6 * width + 4)
    return (logits + ends) // cfg.mesh.model


def compile_best(
    ranked: Sequence[Candidate], devices: Sequence[Any], number: int
) -> tuple[list[tuple[Candidate, Card]], list[str]]:
    """Compiles the first candidates.

    Returns them with their cards, those that fit and are the fastest first, and why the compiler
    refused the others.
    """
    compiled: list[tuple[Candidate, Card]] = []
    refused: list[str] = []
    for one in ranked[:number]:
        with jax.set_mesh(mesh.make(one.mesh, devices, one.cfg.mesh_slow_axis)):
            try:
                compiled.append((one, card(one.cfg)))
            except TooLarge as reason:
                refused.append(f"{one.label}: {reason}")

    def order(pair: tuple[Candidate, Card]) -> tuple[bool, float]:
        found = pair[1]
        step = found.estimate.step if found.estimate else sum(w.done for w in found.work)
        return found.fits is False, step

    return sorted(compiled, key=order), refused


def estimates_table(ranked: Sequence[Candidate]) -> Table:
    """Returns the best candidates by the estimate."""
    table = Table(
        [
            *names("estimate, not compiled"),
            *numbers("memory", "FLOPs", "traffic", "received", "ms a step"),
        ]
    )
    for one in ranked[:SHOWN]:
        seconds = f"{1000 * one.seconds:,.1f}" if one.seconds else ""
        moved = decimal(one.moved) if one.moved else ""
        sizes = decimal(one.memory), readable(one.flops), moved, decimal(one.received)
        table.add(one.label, *sizes, seconds)
    return table


def compiled_table(compiled: Sequence[tuple[Candidate, Card]]) -> Table:
    """Returns the candidates that were compiled, the best first."""
    table = Table(
        [
            *names("compiled"),
            *numbers("memory", "FLOPs", "traffic", "received", "ms a step", "tokens/s", "MFU"),
            *names("bound by"),
        ]
    )
    for one, found in compiled:
        time = found.estimate
        sent = sum(each.num_bytes for each in found.compiled.program.collectives)
        fits = "" if found.fits is not False else " (does not fit)"
        table.add(
            one.label,
            decimal(found.peak_logged) + fits,
            readable(sum(each.done for each in found.work)),
            decimal(found.compiled.program.memory_traffic.total()),
            decimal(sent),
            f"{1000 * time.step:,.1f}" if time else "",
            readable(time.tokens_per_second) if time else "",
            f"{time.mfu:.1%}" if time else "",
            time.bound if time else "",
        )
    return table
