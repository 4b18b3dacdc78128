"""One device against plain arithmetic: the MoE layer, and the kernels that differ by platform
against each other.

    y_t = sum over e of G_te * expert_e(x_t)                                 assignments
    y_t = sum over e, s of C_tes * expert_e(sum over t' of D_t'es x_t')      mixtures (soft MoE), within a group

G, or D and C, come from the router itself: a dispatcher that serves nobody but writes them into its
output. So what is checked is everything after the router: dispatch, the grouped product, which gate
meets which expert, gate and up columns, and all their gradients. A token's copy of itself (null
experts) is one more column.
Shapes: B rows, S sequence, T tokens, D model, E experts, F hidden, P = 2 (gate, up) or 1, G groups,
t tokens of a group, p slots.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.models import attention_core
from moe_jax.models.decoder import moe_config
from moe_jax.moe.dispatch import DISPATCHERS, Dispatcher
from moe_jax.moe.layer import Batch, MoE, MoELayer
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Routing
from moe_jax.parallel.compiling import QUICK, of_other_platforms
from moe_jax.parallel.mesh import P
from moe_jax.schema.config import Config
from moe_jax.verify.compare import far, largest, relative_gradients
from moe_jax.verify.program import Program

NAME = "gates of the reference"
# tokens of a sequence whose attention is compared: enough for all the blocks that there are
LONGEST = 1024


class Dense(NamedTuple):
    """The layer beside the reference."""

    output: float  # largest deviation relative to the largest output
    gradient: float  # likewise of the worst gradient
    where: str  # whose gradient that is


def gates(x_TD, routing, experts, *, shape, options):
    """A dispatcher in form: the first columns of its output are a token's gates for all experts and
    the weight of its copy, or D and C.
    """
    del experts, options

    def padded(told):
        return jnp.pad(told, ((0, 0), (0, x_TD.shape[1] - told.shape[1])))

    if not isinstance(routing, Routing):
        told = [
            z.reshape(shape.num_tokens, -1).astype(x_TD.dtype)
            for z in (routing.dispatch_GtEp, routing.combine_GtEp)
        ]
        return padded(jnp.concatenate(told, 1)), jnp.zeros((0,), bool)
    gate_TE = jnp.zeros_like(x_TD, shape=(shape.num_tokens, shape.num_experts))
    place = (routing.token_N, routing.expert_N)
    gate_TE = gate_TE.at[place].add(routing.gate_N.astype(x_TD.dtype), mode="drop")
    copy_T1 = (
        jnp.zeros_like(x_TD[:, :1])
        if routing.copy_T is None
        else routing.copy_T.astype(x_TD.dtype)[:, None]
    )
    told_TD = padded(jnp.concatenate([gate_TE, copy_T1], 1))
    return told_TD - copy_T1 * x_TD, jnp.zeros_like(
        routing.expert_N, dtype=bool
    )  # the layer adds the copy


@contextlib.contextmanager
def gates_dispatcher() -> Iterator[None]:
    DISPATCHERS[NAME] = Dispatcher(object, gates, lambda shape, options: 0, drops=False)
    try:
        yield
    finally:
        del DISPATCHERS[NAME]


def served(cfg: MoE) -> MoE:
    """The layer with a width for what the router tells, and places for every assignment."""
    options = cfg.dispatcher_options
    if hasattr(options, "factor"):
        options = dataclasses.replace(options, factor=float(cfg.num_experts))
    num_slots = ROUTERS[cfg.router].num_slots(cfg.router_options)
    told = 2 * cfg.num_experts * num_slots if num_slots else cfg.num_experts + 1
    width = max(cfg.d_model, -(-told // 8) * 8)
    return dataclasses.replace(cfg, d_model=width, dispatcher_options=options)


def compare(program: Program) -> Dense:
    """On the mesh of `program`, which must be one device, with random activations and ids."""
    cfg = served(moe_config(program.cfg.model))
    with program.entered(), gates_dispatcher():
        batch = Batch(*map(program.on_mesh, _rows(program.cfg)))
        keys = jax.random.split(jax.random.key(program.cfg.seed), 4)
        x_BSD = jax.random.normal(keys[0], (*batch.id_BS.shape, cfg.d_model), cfg.dtype)
        weight_BSD = jax.random.normal(keys[1], x_BSD.shape, cfg.dtype)
        x_BSD, weight_BSD = program.on_mesh(x_BSD), program.on_mesh(weight_BSD)

        def split(cfg):
            return nnx.split(MoELayer(keys[2], cfg), nnx.Param, ...)

        spied = dataclasses.replace(cfg, dispatcher=NAME)
        graphs = {
            name: nnx.eval_shape(lambda c=c: split(c))[0]
            for name, c in (("layer", cfg), ("gates", spied))
        }

        def run(name: str, values: Any, x_BSD: jax.Array):
            return nnx.merge(graphs[name], *values)(x_BSD, batch, keys[3], True)

        def layer(params: Any, rest: Any, x_BSD: jax.Array):
            y_BSD, _ = run("layer", (params, rest), x_BSD)
            return (y_BSD * weight_BSD).sum(), y_BSD

        def reference(params: Any, rest: Any, x_BSD: jax.Array):
            def plain(z):
                return jax.sharding.reshard(z, P())

            told_BSD, x_BSD = plain(run("gates", (params, rest), x_BSD)[0]), plain(x_BSD)

            def work(x):
                return dense(
                    x, jax.tree.map(plain, nnx.to_pure_dict(params)["experts"]), cfg.activation
                )

            y_BSD = (mixed if ROUTERS[cfg.router].num_slots(cfg.router_options) else gated)(
                x_BSD, told_BSD, work, cfg
            )
            return (y_BSD * plain(weight_BSD)).sum(), y_BSD

        def both(x_BSD: jax.Array):
            _, params, rest = split(cfg)

            def grad(f):
                return jax.grad(f, argnums=(0, 2), has_aux=True)(params, rest, x_BSD)

            return grad(layer), grad(reference)

        have, want = jax.device_get(
            jax.jit(both).lower(x_BSD).compile(compiler_options=QUICK)(x_BSD)
        )
    return _deviation(program, want, have)


def _rows(cfg: Config) -> tuple[jax.Array, ...]:
    """ids, positions, segments and row numbers: padding at the end of every other row."""
    num, length = cfg.train.batch_size, cfg.data.seq_len
    id_BS = np.random.default_rng(cfg.seed).integers(
        1, cfg.model.vocab_size, (num, length), dtype=np.int32
    )
    place_BS = np.tile(np.arange(length, dtype=np.int32), (num, 1))
    row_B = np.arange(num, dtype=np.int32)
    segment_BS = np.where((row_B[:, None] % 2 == 0) & (place_BS >= length - 3), 0, 1).astype(
        np.int32
    )
    return tuple(map(jnp.asarray, (id_BS, place_BS, segment_BS, row_B)))


def gated(x_BSD: jax.Array, told_BSD: jax.Array, work: Any, cfg: MoE) -> jax.Array:
    """Every expert works on every token."""
    gate_BSE, copy_BS1 = (
        told_BSD[..., : cfg.num_experts],
        told_BSD[..., cfg.num_experts : cfg.num_experts + 1],
    )
    y_BSED = work(
        jnp.broadcast_to(x_BSD[:, :, None], (*x_BSD.shape[:2], cfg.num_experts, x_BSD.shape[2]))
    )
    return jnp.einsum("BSED,BSE->BSD", y_BSED, gate_BSE) + copy_BS1 * x_BSD


def mixed(x_BSD: jax.Array, told_BSD: jax.Array, work: Any, cfg: MoE) -> jax.Array:
    """Every expert works on its mixtures of the tokens of each group."""
    slots = ROUTERS[cfg.router].num_slots(cfg.router_options)
    num = cfg.num_experts * slots

    def groups(z):
        return z.reshape(-1, min(cfg.group_rows, z.shape[0]) * z.shape[1], *z.shape[2:])

    def by_slot(z):
        return groups(z).reshape(*groups(z).shape[:2], cfg.num_experts, slots)

    dispatch_GtEp, combine_GtEp = (
        by_slot(told_BSD[..., :num]),
        by_slot(told_BSD[..., num : 2 * num]),
    )
    y_GpED = work(jnp.einsum("GtEp,GtD->GpED", dispatch_GtEp, groups(x_BSD)))
    return jnp.einsum("GtEp,GpED->GtD", combine_GtEp, y_GpED).reshape(x_BSD.shape)


def dense(x_xyED: jax.Array, weights: Mapping[str, jax.Array], activation: str) -> jax.Array:
    """What each expert makes of its own rows."""
    h_xyEPF = jnp.einsum("xyED,EDPF->xyEPF", x_xyED, weights["w_in"])
    first, last = h_xyEPF[..., 0, :], h_xyEPF[..., -1, :]
    a_xyEF = first / (1 + jnp.exp(-first)) * last if activation == "swiglu" else jax.nn.gelu(first)
    return jnp.einsum("xyEF,EFD->xyED", a_xyEF, weights["w_out"])


@jax.enable_x64(True)
def attention_kernels(length: int) -> float:
    """The attention of a CPU, in blocks of queries and groups of heads, beside that of
    accelerators, all at once; gradients included.

    On sequences of two documents and padding, as long as the config's (LONGEST at most: the scores
    of all heads are held), and so many heads that they are two groups.
    """
    S, queries = min(length, LONGEST), 2
    B, G, A = 2, max(4, attention_core.SCORES // (S * S * queries)), 4
    shapes = [(B, S, G * queries, A), (B, S, G, A), (B, S, G, A), (B, S, G * queries, A)]
    q, k, v, weight = (
        jnp.asarray(z) for z in map(np.random.default_rng(0).normal, [0] * 4, [1] * 4, shapes)
    )
    place_S = np.arange(S)
    segment_BS = jnp.asarray(
        np.stack([np.where(place_S < S // 3, 1, 2), np.where(place_S < S - S // 4, 1, 0)]).astype(
            np.int32
        )
    )

    def run(seen: Any) -> list[np.ndarray]:
        def value(q, k, v):
            o = attention_core.attention(q, k, v, seen(segment_BS), scale=0.5)
            return (o * weight).sum(), o

        (_, o), gradients = jax.jit(
            jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK
        )(q, k, v)
        return [np.asarray(z) for z in (o, *gradients)]

    found: dict[str, float] = {}
    for seen in (attention_core.causal, attention_core.full):
        have = run(seen)
        with of_other_platforms():
            want = run(seen)
        pairs = zip(("o", "q", "k", "v"), want, have, strict=True)
        found |= {f"{name}, {seen.__name__}": far(a, b, np.abs(a).max()) for name, a, b in pairs}
    return largest(found)[1]


def _deviation(program: Program, want: Any, have: Any) -> Dense:
    (want_grads, want_y), (have_grads, have_y) = want, have
    if not np.abs(want_y).max():
        return Dense(np.nan, np.nan, "no assignment was served: the check proves nothing")

    def name(grads):
        return program.named({"weights": nnx.to_pure_dict(grads[0]), "activations": grads[1]})

    gradients = relative_gradients(name(want_grads), name(have_grads))
    worst, value = largest(gradients)
    return Dense(far(want_y, have_y, np.abs(want_y).max()), value, worst)
