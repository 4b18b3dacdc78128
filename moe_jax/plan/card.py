"""The resource card of a config, `--dry_run`: parameters, FLOPs, memory and traffic, before
anything is allocated.

Counts and shards are exact, the compiler's figures are those of the step that training runs, for
the platform of these devices. What is an estimate says so. Everything is abstract: the card costs
the compilation and no memory.

Shapes: B rows, S sequence, T tokens of a device in one micro-batch, D model, F expert hidden, R
rows of a dispatch buffer.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from rich.console import Group
from rich.filesize import decimal, pick_unit_and_suffix
from rich.padding import Padding

from moe_jax import train_step
from moe_jax.models.block import moe_config
from moe_jax.moe.dispatch import DISPATCHERS, LOSSLESS
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.layer import Batch, MoE, MoELayer, num_intended
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg, Sizes, Slots, Tokens
from moe_jax.parallel.mesh import Lengths, of, sharding
from moe_jax.plan import flops
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS
from moe_jax.terminal.table import Table, names, numbers, prose
from moe_jax.weights import RouterState


class Memory(NamedTuple):
    """Bytes on one device, from the shardings; every device holds as much."""

    parameters: int
    gradients: int  # as many as the parameters, within the compiler's `temporary`
    optimizer: int
    ema: int
    master: int  # the copy in float32 of optim.master_copy


class Compiled(NamedTuple):
    """Bytes of the compiled train step on one device, and seconds that compiling it took."""

    argument: int
    output: int
    alias: int  # of the output: written over a donated argument
    temporary: int
    seconds: float

    @property
    def peak(self) -> int:
        return self.argument + self.output - self.alias + self.temporary


class Dispatch(NamedTuple):
    """One MoE layer on one device, for one micro-batch."""

    rows_held: int  # the buffer's, filled or not
    rows_balanced: int  # what arrives when every expert is chosen equally often
    rows_worst: int  # what arrives when every token chooses the experts of this device
    row_bytes: int  # estimate
    forward: Mapping[str, int]  # bytes received, by mesh axis
    backward: Mapping[str, int]


class Card(NamedTuple):
    platform: str
    mesh: Lengths
    num_layers: tuple[int, int]  # dense, MoE
    batch_size: int
    seq_len: int
    num_micro_batches: int
    parameters: flops.Counts
    forward: flops.Breakdown  # FLOPs per token
    train_per_token: int  # FLOPs
    train_per_step: int
    memory: Memory
    dispatcher: str
    dispatch: Dispatch | None  # None without MoE layers
    compiled: Compiled

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


def card(cfg: Config) -> Card:
    """The card of a config on the current mesh.

    Compiles the train step once; allocates nothing on the devices.
    """
    model, seq_len = cfg.model, cfg.data.seq_len
    functions = train_step.make_model(model)
    abstract = jax.eval_shape(train_step.initial(cfg, functions), jax.random.key(0))
    mesh = jax.sharding.get_mesh()
    train = flops.train_per_token(model, seq_len)
    return Card(
        platform=mesh.devices.flat[0].device_kind,
        mesh=of(mesh),
        num_layers=(model.num_dense_layers, model.num_moe_layers),
        batch_size=cfg.train.batch_size,
        seq_len=seq_len,
        num_micro_batches=cfg.train.num_micro_batches,
        parameters=flops.parameters(model),
        forward=flops.forward_per_token(model, seq_len),
        train_per_token=train,
        train_per_step=train * cfg.train.batch_size * seq_len,
        memory=_memory(abstract),
        dispatcher=model.moe.dispatcher,
        dispatch=_dispatch(cfg) if model.num_moe_layers else None,
        compiled=_compiled(cfg, functions, abstract),
    )


def _memory(abstract: train_step.State) -> Memory:
    parameters = _shard_bytes(abstract.params)
    beside = (_shard_bytes(tree) for tree in (abstract.opt_state, abstract.ema, abstract.master))
    return Memory(parameters, parameters, *beside)


def _shard_bytes(tree: Any) -> int:
    """Returns the bytes of one shard of every abstract array; one without a sharding lies whole on
    every device.
    """

    def shard(x):
        return x.sharding.shard_shape(x.shape) if x.sharding else x.shape

    return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _abstract(rows: np.ndarray) -> jax.ShapeDtypeStruct:
    """Returns the shape and sharding of an array of a batch [B, ...]."""
    place = sharding("batch", *[None] * (rows.ndim - 1))
    dtype = jax.dtypes.canonicalize_dtype(rows.dtype)  # what the device makes of NumPy's float64
    return jax.ShapeDtypeStruct(rows.shape, dtype, sharding=place)


def _compiled(cfg: Config, model: train_step.Model, abstract: train_step.State) -> Compiled:
    start = time.perf_counter()
    step = jax.jit(
        train_step.make_step(cfg, model, train_step.make_tx(cfg, abstract.params)), donate_argnums=0
    )
    batch = jax.tree.map(_abstract, TASKS[cfg.task].random(cfg, 0))
    stats: Any = step.lower(abstract, batch).compile().memory_analysis()
    return Compiled(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def buffer_note(cfg: Config) -> str:
    """The memory of the dispatch buffer in one line of 70 columns, to be told before the first
    step.
    """
    shape, row_bytes = _shape(cfg)
    moe = cfg.model.moe
    held, balanced = (
        DISPATCHERS[moe.dispatcher].rows(shape, moe.dispatcher_options),
        shape.num_intended,
    )
    return (
        f"{moe.dispatcher}: {held:,} rows, {_units(held * row_bytes)}B per MoE layer and device, "
        f"{held / balanced:.2f} x balanced"
    )


def _shape(cfg: Config) -> tuple[Shape, int]:
    """(the sizes that a dispatcher works with, estimated bytes of a row in its buffers)."""
    moe, mesh = moe_config(cfg.model), cfg.mesh
    rows = cfg.train.micro_batch_size // mesh.batch_devices
    num_assignments, per_token = _assignments(moe, rows, cfg.data.seq_len)
    shape = Shape(
        num_experts=moe.num_experts,
        num_tokens=rows * cfg.data.seq_len,
        num_assignments=num_assignments,
        num_intended=num_intended(moe, rows * cfg.data.seq_len, num_assignments),
        per_token=per_token,
        group_tokens=min(moe.group_rows, rows) * cfg.data.seq_len,
        expert_axis=mesh.expert,
    )
    parts = 2 if moe.activation == "swiglu" else 1
    width = (
        2 * moe.d_model + parts * moe.expert_hidden // mesh.model
    )  # in, out and before the activation
    return shape, width * jnp.dtype(moe.dtype).itemsize


def _assignments(moe: MoE, rows: int, seq_len: int) -> tuple[int, int]:
    """(assignments that the router of a layer makes on one device, or slots that it fills; how many
    per token, 0 if that varies).
    """
    router, num = ROUTERS[moe.router], rows * seq_len
    sizes = Sizes(moe.d_model, moe.num_experts, moe.vocab_size)
    router_cfg = RouterCfg(
        moe.num_experts, moe.router_options, min(moe.group_rows, rows), moe.vocab_size, lambda z: z
    )
    found: list[tuple[int, int]] = []

    def route() -> None:
        def weights(declared):
            return {
                name: jnp.zeros(w.shape) for name, w in declared(sizes, moe.router_options).items()
            }

        zero_T = jnp.zeros(num, jnp.int32)
        tokens = Tokens(
            jnp.zeros((num, moe.d_model)), zero_T, zero_T, zero_T, zero_T, zero_T == 0, rows
        )
        args = (weights(router.params), weights(router.state), tokens)
        routing = router.route(*args, cfg=router_cfg, rng=jax.random.key(0), train=True)
        if isinstance(routing, Slots):
            found.append((routing.dispatch_GtEp.size // routing.dispatch_GtEp.shape[1], 0))
        else:
            found.append((routing.expert_N.size, routing.per_token))

    jax.eval_shape(route)  # shapes only: nothing is computed
    return found[0]


def _dispatch(cfg: Config) -> Dispatch:
    moe, (shape, row_bytes) = cfg.model.moe, _shape(cfg)
    forward, both = _traffic(cfg)
    held = DISPATCHERS[moe.dispatcher].rows(shape, moe.dispatcher_options)
    return Dispatch(
        rows_held=held,
        rows_balanced=shape.num_intended,
        rows_worst=held
        if DISPATCHERS[moe.dispatcher].mixes
        else DISPATCHERS[LOSSLESS].rows(shape, DISPATCHERS[LOSSLESS].options()),
        row_bytes=row_bytes,
        forward=dict(forward),
        backward=dict(both - forward),
    )


def _traffic(cfg: Config) -> tuple[Counter[str], Counter[str]]:
    """(forward, forward and backward) of one MoE layer:

    `received` of the layer as training traces it.
    """
    moe = moe_config(cfg.model)

    def split(key):
        return nnx.split(MoELayer(key, moe), nnx.Param, RouterState)

    graphdef, weights, router_state = nnx.eval_shape(split, jax.random.key(0))
    num_rows, seq_len = cfg.train.micro_batch_size, cfg.data.seq_len
    zero_BS = np.zeros((num_rows, seq_len), np.int32)
    batch = jax.tree.map(_abstract, Batch(zero_BS, zero_BS, zero_BS, zero_BS[:, 0]))
    x_BSD = jax.ShapeDtypeStruct(
        (num_rows, seq_len, moe.d_model), moe.dtype, sharding=sharding("batch", None, None)
    )

    def run(weights: Any, x_BSD: jax.Array, router_state: Any, batch: Batch) -> jax.Array:
        return nnx.merge(graphdef, weights, router_state)(x_BSD, batch, jax.random.key(0), True)[0]

    def gradient(weights: Any, x_BSD: jax.Array, *rest: Any) -> Any:
        y_BSD, pull = jax.vjp(lambda weights, x_BSD: run(weights, x_BSD, *rest), weights, x_BSD)
        return pull(y_BSD)

    arguments, lengths = (weights, x_BSD, router_state, batch), dict(jax.sharding.get_mesh().shape)

    def trace(f):
        return received(jax.make_jaxpr(f)(*arguments).jaxpr, lengths)

    return trace(run), trace(gradient)


def received(jaxpr: Jaxpr, lengths: Mapping[str, int]) -> Counter[str]:
    """Bytes that a device receives in the collectives of a traced function, by mesh axis; `lengths`
    of the mesh's axes.

    Of n parts a device has one and receives n - 1; a sum over devices is a reduce-scatter and an
    all-gather (Thakur et al. 2005). Loops count every trip, of branches the dearest counts. Only
    collectives that the code writes are seen, not those that the compiler inserts.
    """
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name, invars, outvars = equation.primitive.name, equation.invars, equation.outvars
        if name in COLLECTIVES:
            axes = equation.params.get("axis_name", equation.params.get("axes"))
            axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if lengths[a] > 1)
            n = math.prod(lengths[a] for a in axes)
            whole = max(sum(_bytes(v.aval) for v in vs) for vs in (invars, outvars))
            total[" x ".join(axes)] += COLLECTIVES[name] * whole * (n - 1) // n
        inner = [received(j, lengths) for j in _inner(equation.params)]
        if name == "cond":
            inner = [max(inner, key=lambda counter: counter.total())]
        trips = equation.params.get("length", 1) if name == "scan" else 1
        for counter in inner:
            total.update({axis: trips * count for axis, count in counter.items()})
    return +total


# How often the bytes of the larger side of a collective pass a device.
COLLECTIVES = {
    "all_gather": 1,
    "all_gather_invariant": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "psum": 2,
    "psum_invariant": 2,
}


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _inner(params: Mapping[str, Any]) -> list[Jaxpr]:
    """The functions that an equation calls."""
    flat = [w for v in params.values() for w in (v if isinstance(v, tuple | list) else (v,))]
    return [
        w.jaxpr if isinstance(w, ClosedJaxpr) else w
        for w in flat
        if isinstance(w, ClosedJaxpr | Jaxpr)
    ]


FLOPS_NOTE = "FLOPs: of the matrix products, 2 for a multiply-add."
LAYER_NOTE = "An MoE layer: for one micro-batch, without what the backward pass repeats."


def render(card: Card) -> Group:
    """The card as rich tables, within 80 columns; they read as well in a file as on a terminal."""
    tables, notes = [_model_table(card), _memory_table(card)], [FLOPS_NOTE]
    if card.dispatch:
        tables += [_dispatch_table(card, card.dispatch), _traffic_table(card.dispatch)]
        notes += [LAYER_NOTE]
    return Group(_heading(card), *(Padding(table, (1, 0, 0, 0)) for table in tables), "", *notes)


def _heading(card: Card) -> str:
    axes = card.mesh.split()
    micro = f", in {card.num_micro_batches} micro-batches" if card.num_micro_batches > 1 else ""
    devices = f"{card.mesh.num_devices} x {card.platform}{f' ({axes})' if axes else ''}"
    dense, moe = card.num_layers
    return (
        f"{devices}, {dense} dense and {moe} MoE blocks\n"
        f"a step: {card.batch_size} rows x {card.seq_len} tokens = {card.tokens_per_step:,} "
        f"tokens{micro}"
    )


def _model_table(card: Card) -> Table:
    """Parameters beside the FLOPs that they cost."""
    p, f = card.parameters, card.forward
    table = _table("model", "parameters", "active", "FLOPs a token", "share")
    tied = "embedding and head" if not p.head else "embedding"
    for name, total, active, work in (
        (tied, p.embedding, p.embedding, 0 if p.head else f.head),
        ("attention projections", p.attention, p.attention, f.attention_projections),
        ("attention scores, causal", 0, 0, f.attention_scores),
        ("dense feed-forward", p.dense, p.dense, f.dense),
        ("shared experts", p.shared, p.shared, f.shared),
        ("routed experts", p.experts, p.experts_active, f.experts),
        ("routers", p.router, p.router, f.router),
        ("norms", p.norms, p.norms, 0),
        ("head", p.head, p.head, f.head if p.head else 0),
    ):
        if total or work:
            share = f"{work / f.total:.1%}" if work else ""
            table.add(name, *(f"{n:,}" if n else "" for n in (total, active, work)), share)
    table.section()
    table.add("all, forward", f"{p.total:,}", f"{p.active:,}", f"{f.total:,}", "100%")
    table.add("without embedding and head", f"{p.total_body:,}", f"{p.active_body:,}")
    table.add("training, 3 x forward", "", "", f"{card.train_per_token:,}")
    table.add("training, of a step", "", "", _units(card.train_per_step))
    return table


def _memory_table(card: Card) -> Table:
    m, c = card.memory, card.compiled
    table = _table("memory of one device", "bytes", "")
    for name, size, note in (
        ("parameters", m.parameters, ""),
        ("optimizer state", m.optimizer, ""),
        ("moving average", m.ema, ""),
        ("master copy", m.master, "of the parameters, in float32"),
        ("gradients", m.gradients, "estimate: as much as the parameters"),
        ("compiled step: arguments", c.argument, "state and batch"),
        ("compiled step: new outputs", c.output - c.alias, "those not written over the state"),
        ("compiled step: temporary", c.temporary, "gradients, activations, buffers"),
    ):
        if size:
            table.add(name, decimal(size), note)
    table.section()
    table.add("compiled step: peak", decimal(c.peak), f"by the compiler, after {c.seconds:.0f} s")
    return table


def _dispatch_table(card: Card, d: Dispatch) -> Table:
    table = _table("an MoE layer, one device", "rows", "bytes (estimate)", "")
    more = DISPATCHERS[card.dispatcher].overflow
    for name, rows, note in (
        (
            f"{card.dispatcher} buffer",
            d.rows_held,
            more if d.rows_held < d.rows_worst else "never too small",
        ),
        (
            "balanced load",
            d.rows_balanced,
            f"fills {d.rows_balanced / d.rows_held:.0%} of the buffer",
        ),
        ("worst case", d.rows_worst, "all choose this device"),
    ):
        table.add(name, f"{rows:,}", decimal(rows * d.row_bytes), note)
    return table


def _traffic_table(d: Dispatch) -> Table:
    table = _table("an MoE layer, one device", "forward", "backward", "bytes received")
    what = {
        "expert": "tokens, and back",
        "data": "expert weights",
        "model": "sums over hidden columns",
    }
    for axis in sorted({*d.forward, *d.backward}, key=lambda axis: (axis not in what, axis)):
        sizes = (decimal(part[axis]) if axis in part else "" for part in (d.forward, d.backward))
        table.add(f"over {axis}", *sizes, what.get(axis, "sums of small gradients"))
    if not table.rows:
        table.add("nothing travels")
    return table


def _table(title: str, *columns: str) -> Table:
    """The first column is named by what the table is about, the last one holds notes where it is
    not a number.
    """
    notes = columns[-1] in ("", "bytes received")
    figures = columns[:-1] if notes else columns
    return Table([*names(title), *numbers(*figures), *prose(*columns[len(figures) :])])


def _units(number: int) -> str:
    """1234567 -> "1.23 M": three digits and a power of 1000."""
    size, unit = pick_unit_and_suffix(number, ["", "k", "M", "G", "T", "P", "E", "Z"], 1000)
    return f"{number / size:.3g} {unit}".strip()
