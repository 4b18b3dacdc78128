"""The MoE layer against plain arithmetic on one device: every expert works on every token, and the gates pick.

    y_t = sum over e of G_te * expert_e(x_t)

G comes from the router itself: a dispatcher that serves nobody but writes each token's gates into its output. So what is checked is
everything after the router: dispatch, the grouped product, which gate meets which expert, gate and up columns, and all their gradients.
A token's copy of itself (null experts) is one more column. Soft MoE routes mixtures instead of tokens and has no such G.
Shapes: B rows, S sequence, T tokens, D model, E experts, F hidden, P = 2 (gate, up) or 1.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.compiling import QUICK
from moe_jax.config import Config, Options
from moe_jax.mesh import P
from moe_jax.models.decoder import moe_config
from moe_jax.moe.dispatch import DISPATCHERS, Dispatcher
from moe_jax.moe.layer import Batch, MoE, MoELayer
from moe_jax.moe.routing.contract import Routing
from moe_jax.verify.compare import far, relative_gradients
from moe_jax.verify.program import Program

NAME = "gates of the reference"


class Dense(NamedTuple):
    """The layer beside the reference."""

    output: float  # largest deviation relative to the largest output
    gradient: float  # likewise of the worst gradient
    where: str  # whose gradient that is


def gates(x_TD, routing, experts, *, shape, options):
    """A dispatcher in form: each token's gate for every expert in the first E columns of its output, then the weight of its copy."""
    del experts, options
    if not isinstance(routing, Routing):
        raise NoGates
    gate_TE = jnp.zeros_like(x_TD, shape=(shape.num_tokens, shape.num_experts))
    place = (routing.token_N, routing.expert_N)
    gate_TE = gate_TE.at[place].add(routing.gate_N.astype(x_TD.dtype), mode="drop")
    copy_T1 = jnp.zeros_like(x_TD[:, :1]) if routing.copy_T is None else routing.copy_T.astype(x_TD.dtype)[:, None]
    told_TD = jnp.pad(jnp.concatenate([gate_TE, copy_T1], 1), ((0, 0), (0, x_TD.shape[1] - shape.num_experts - 1)))
    return told_TD - copy_T1 * x_TD, jnp.zeros_like(routing.expert_N, dtype=bool)  # the layer adds the copy


class NoGates(Exception):
    """The router gives mixtures."""


@contextlib.contextmanager
def gates_dispatcher() -> Iterator[None]:
    DISPATCHERS[NAME] = Dispatcher(gates, lambda shape, options: 0)
    try:
        yield
    finally:
        del DISPATCHERS[NAME]


def served(cfg: MoE) -> MoE:
    """The layer with a width for the gates of all experts, and places for every assignment."""
    options = dict(cfg.dispatcher_options)
    if "factor" in options:
        options["factor"] = float(cfg.num_experts)
    width = max(cfg.d_model, -(-(cfg.num_experts + 1) // 8) * 8)
    return dataclasses.replace(cfg, d_model=width, dispatcher_options=Options(options))


def compare(program: Program) -> Dense:
    """On the mesh of `program`, which must be one device, with random activations and ids. Raises NoGates for soft MoE."""
    cfg = served(moe_config(program.cfg.model))
    with program.entered(), gates_dispatcher():
        batch = Batch(*map(program.on_mesh, _rows(program.cfg)))
        keys = jax.random.split(jax.random.key(program.cfg.seed), 4)
        x_BSD = jax.random.normal(keys[0], (*batch.id_BS.shape, cfg.d_model), cfg.dtype)
        weight_BSD = jax.random.normal(keys[1], x_BSD.shape, cfg.dtype)
        x_BSD, weight_BSD = program.on_mesh(x_BSD), program.on_mesh(weight_BSD)
        split = lambda cfg: nnx.split(MoELayer(keys[2], cfg), nnx.Param, ...)
        spied = dataclasses.replace(cfg, dispatcher=NAME)
        graphs = {name: nnx.eval_shape(lambda c=c: split(c))[0] for name, c in (("layer", cfg), ("gates", spied))}

        def run(name: str, values: Any, x_BSD: jax.Array):
            return nnx.merge(graphs[name], *values)(x_BSD, batch, keys[3], True)

        def layer(params: Any, rest: Any, x_BSD: jax.Array):
            y_BSD, _ = run("layer", (params, rest), x_BSD)
            return (y_BSD * weight_BSD).sum(), y_BSD

        def reference(params: Any, rest: Any, x_BSD: jax.Array):
            told_BSD, e = run("gates", (params, rest), x_BSD)[0], cfg.num_experts
            y_BSD = dense(x_BSD, told_BSD[..., :e], nnx.to_pure_dict(params)["experts"], cfg.activation)
            y_BSD += jax.sharding.reshard(told_BSD[..., e : e + 1] * x_BSD, P())
            return (y_BSD * jax.sharding.reshard(weight_BSD, P())).sum(), y_BSD

        def both(x_BSD: jax.Array):
            _, params, rest = split(cfg)
            grad = lambda f: jax.grad(f, argnums=(0, 2), has_aux=True)(params, rest, x_BSD)
            return grad(layer), grad(reference)

        have, want = jax.device_get(jax.jit(both).lower(x_BSD).compile(compiler_options=QUICK)(x_BSD))
    return _deviation(program, want, have)


def _rows(cfg: Config) -> tuple[jax.Array, ...]:
    """ids, positions, segments and row numbers: padding at the end of every other row."""
    num, length = cfg.train.batch_size, cfg.data.seq_len
    id_BS = np.random.default_rng(cfg.seed).integers(1, cfg.model.vocab_size, (num, length), dtype=np.int32)
    place_BS = np.tile(np.arange(length, dtype=np.int32), (num, 1))
    row_B = np.arange(num, dtype=np.int32)
    segment_BS = np.where((row_B[:, None] % 2 == 0) & (place_BS >= length - 3), 0, 1).astype(np.int32)
    return tuple(map(jnp.asarray, (id_BS, place_BS, segment_BS, row_B)))


def dense(x_BSD: jax.Array, gate_BSE: jax.Array, weights: Mapping[str, jax.Array], activation: str) -> jax.Array:
    plain = lambda z: jax.sharding.reshard(z, P())
    x_BSD, gate_BSE = plain(x_BSD), plain(gate_BSE)
    h_BSEPF = jnp.einsum("BSD,EDPF->BSEPF", x_BSD, plain(weights["w_in"]))
    first, last = h_BSEPF[..., 0, :], h_BSEPF[..., -1, :]
    a_BSEF = first / (1 + jnp.exp(-first)) * last if activation == "swiglu" else jax.nn.gelu(first)
    return jnp.einsum("BSEF,EFD,BSE->BSD", a_BSEF, plain(weights["w_out"]), gate_BSE)


def _deviation(program: Program, want: Any, have: Any) -> Dense:
    (want_grads, want_y), (have_grads, have_y) = want, have
    if not np.abs(want_y).max():
        return Dense(np.nan, np.nan, "no assignment was served: the check proves nothing")
    name = lambda grads: program.named({"weights": nnx.to_pure_dict(grads[0]), "activations": grads[1]})
    gradients = relative_gradients(name(want_grads), name(have_grads))
    worst = max(gradients, key=lambda n: np.inf if np.isnan(gradients[n]) else gradients[n])
    return Dense(far(want_y, have_y, np.abs(want_y).max()), gradients[worst], worst)
