"""One device against plain arithmetic: the MoE layer, and the kernels that differ by platform
against each other.

    y_t = sum over e of G_te * expert_e(x_t)                                 assignments
    y_t = sum over e, s of C_tes * expert_e(sum over t' of D_t'es x_t')      mixtures (soft MoE)

Latent experts read x W_down in the place of x, and y W_up is the layer's output.
The tokens t' of a mixture are those of a group. G, or D and C, come from the router itself: the
layer records them (probe.GATES). So what is checked is everything after the router: dispatch, the
grouped product, which gate meets which expert, gate and up columns, and all their gradients. A
token's copy of itself (null experts) has its own weight.

Shapes: B rows, S sequence, T tokens, D model, E experts, F hidden, P = 2 (gate, up) or 1, G groups,
t tokens of a group, p slots.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.models import attention_core, attention_parts
from moe_jax.models.attention_bias import Buckets
from moe_jax.models.block import moe_config
from moe_jax.moe import probe
from moe_jax.moe.activations import ACTIVATIONS
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.experts.network import Chosen
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.moe.settings import MoE
from moe_jax.parallel.compiling import QUICK, of_other_platforms
from moe_jax.parallel.mesh import P
from moe_jax.schema.config import Config
from moe_jax.verify.compare import far, largest, relative_gradients
from moe_jax.verify.program import Program

# Tokens of a sequence whose attention is compared: enough for all the blocks that there are.
LONGEST = 1024


class Dense(NamedTuple):
    """Holds how far the layer is from the reference."""

    # Largest deviation relative to the largest output.
    output: float
    # Likewise of the worst gradient.
    gradient: float
    # Whose gradient that is.
    where: str


def served(cfg: MoE) -> MoE:
    """Returns the layer with places for every assignment: plain arithmetic drops nothing."""
    roomy = DISPATCHERS[cfg.dispatcher].roomy
    options = roomy(cfg.dispatcher_options, cfg.num_experts)
    return dataclasses.replace(cfg, dispatcher_options=options)


def compare(program: Program) -> Dense:
    """Compares layer and reference on the mesh of `program`, which must be one device, with random
    activations and ids.
    """
    cfg = served(moe_config(program.cfg.model))
    with program.entered():
        batch = jax.tree.map(program.on_mesh, _rows(program.cfg))
        keys = jax.random.split(jax.random.key(program.cfg.seed), 4)
        x_BSD = jax.random.normal(keys[0], (*batch.id_BS.shape, cfg.d_model), cfg.dtype)
        weight_BSD = jax.random.normal(keys[1], x_BSD.shape, cfg.dtype)
        x_BSD, weight_BSD = program.on_mesh(x_BSD), program.on_mesh(weight_BSD)

        def split():
            return nnx.split(MoELayer(keys[2], cfg), nnx.Param, ...)

        graph, _, _ = nnx.eval_shape(split)

        def layer(params: Any, rest: Any, x_BSD: jax.Array):
            y_BSD, _ = nnx.merge(graph, params, rest)(x_BSD, batch, keys[3], True)
            # Random weights: the gradient of a plain sum would be the same for every output.
            return (y_BSD * weight_BSD).sum(), y_BSD

        def reference(params: Any, rest: Any, x_BSD: jax.Array):
            def plain(z):
                return jax.sharding.reshard(z, P())

            # The layer runs here too, but only its gates are taken.
            asked = batch._replace(request=probe.Request(record=probe.GATES))
            _, sums = nnx.merge(graph, params, rest)(x_BSD, asked, keys[3], True)
            _, recorded = probe.split(sums)
            weights = {name: plain(z).astype(x_BSD.dtype) for name, z in recorded.items()}
            whole = jax.tree.map(plain, nnx.to_pure_dict(params))
            experts = whole["experts"]

            def work(x):
                return dense(x, experts, cfg.chosen)

            formula = mixed if "dispatch" in weights else gated
            x_BSD = plain(x_BSD)
            if "latent" in whole:
                y_BSD = formula(x_BSD @ whole["latent"]["down"], weights, work, cfg)
                y_BSD = y_BSD @ whole["latent"]["up"]
            else:
                y_BSD = formula(x_BSD, weights, work, cfg)
            if "copy" in weights:
                y_BSD = y_BSD + weights["copy"][:, :, None] * x_BSD
            return (y_BSD * plain(weight_BSD)).sum(), y_BSD

        def both(x_BSD: jax.Array):
            _, params, rest = split()

            def grad(f):
                return jax.grad(f, argnums=(0, 2), has_aux=True)(params, rest, x_BSD)

            return grad(layer), grad(reference)

        compiled = jax.jit(both).lower(x_BSD).compile(compiler_options=QUICK)
        have, want = jax.device_get(compiled(x_BSD))
    return _deviation(program, want, have)


def _rows(cfg: Config) -> Batch:
    """Returns random ids, with padding at the end of every other row."""
    num_rows, length = cfg.train.batch_size, cfg.data.seq_len
    rng = np.random.default_rng(cfg.seed)
    id_BS = rng.integers(1, cfg.model.vocab_size, (num_rows, length), dtype=np.int32)
    position_BS = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
    row_B = np.arange(num_rows, dtype=np.int32)
    padding_BS = (row_B[:, None] % 2 == 0) & (position_BS >= length - 3)
    segment_BS = np.where(padding_BS, 0, 1).astype(np.int32)
    batch = Batch(id_BS=id_BS, position_BS=position_BS, segment_BS=segment_BS, row_B=row_B)
    return jax.tree.map(jnp.asarray, batch)


def gated(x_BSD: jax.Array, weights: Mapping[str, jax.Array], work: Any, cfg: MoE) -> jax.Array:
    """Returns the layer's output [B, S, D] where every expert works on every token."""
    # y_t = sum over e of G_te expert_e(x_t)
    B, S, D = x_BSD.shape
    every_BSED = jnp.broadcast_to(x_BSD[:, :, None], (B, S, cfg.num_experts, D))
    return jnp.einsum("BSED,BSE->BSD", work(every_BSED), weights["gate"])


def mixed(x_BSD: jax.Array, weights: Mapping[str, jax.Array], work: Any, cfg: MoE) -> jax.Array:
    """Returns the layer's output [B, S, D] where every expert works on its mixtures of the tokens
    of each group.
    """

    def groups(z_BS):
        """Returns [G, t, ...] from [B, S, ...]."""
        rows, length, *rest = z_BS.shape
        tokens = min(cfg.group_rows, rows) * length
        # Rows of a group follow each other, as they do in the layer.
        return z_BS.reshape(-1, tokens, *rest)

    # y_t = sum over e, s of C_tes expert_e(sum over t' of D_t'es x_t')
    dispatch_GtEp, combine_GtEp = groups(weights["dispatch"]), groups(weights["combine"])
    slots_GpED = jnp.einsum("GtEp,GtD->GpED", dispatch_GtEp, groups(x_BSD))
    y_GpED = work(slots_GpED)
    return jnp.einsum("GtEp,GpED->GtD", combine_GtEp, y_GpED).reshape(x_BSD.shape)


def dense(x_xyED: jax.Array, weights: Mapping[str, jax.Array], chosen: Chosen) -> jax.Array:
    """Returns what each expert makes of its own rows."""
    h_xyEPF = jnp.einsum("xyED,EDPF->xyEPF", x_xyED, weights["w_in"])
    if "in_bias" in weights:
        h_xyEPF = h_xyEPF + weights["in_bias"][None, None]
    kind = ACTIVATIONS[chosen.activation]
    parts = (h_xyEPF[..., i, :] for i in range(kind.parts))
    # Written out: it shares no code with the experts.
    a_xyEF = kind.reference(chosen.options or kind.options(), *parts)
    y_xyED = jnp.einsum("xyEF,EFD->xyED", a_xyEF, weights["w_out"])
    return y_xyED + weights["out_bias"][None, None] if "out_bias" in weights else y_xyED


@jax.enable_x64(True)
def attention_kernels(length: int, cap: float = 0.0, biases: Sequence[Buckets] = ()) -> float:
    """Returns how far the attention of a CPU, in blocks of queries and groups of heads, is from
    that of accelerators, all at once; gradients included.

    The sequences are of two documents and padding, as long as the config's (LONGEST at most: the
    scores of all heads are held), and have so many heads that they are two groups. `cap`: on the
    scores, model.attention_cap. `biases`: by the distance of two tokens, which are compared as
    well.
    """
    S, queries = min(length, LONGEST), 2
    # So many key heads G that their scores fill more than one group.
    B, G, A = 2, max(4, attention_parts.SCORES // (S * S * queries)), 4
    rng = np.random.default_rng(0)

    def draw(heads):
        return jnp.asarray(rng.normal(0, 1, (B, S, heads, A)))

    q, k, v, weight = draw(G * queries), draw(G), draw(G), draw(G * queries)
    most = max((buckets.number for buckets in biases), default=1)
    table_LH = jnp.asarray(rng.normal(0, 1, (most, G * queries)))
    index_S = np.arange(S)
    # One row has two documents, the other padding at its end.
    two_documents_S = np.where(index_S < S // 3, 1, 2)
    padded_S = np.where(index_S < S - S // 4, 1, 0)
    segment_BS = jnp.asarray(np.stack([two_documents_S, padded_S]).astype(np.int32))

    def run(visible: Any, buckets: Buckets | None) -> list[np.ndarray]:
        def value(q, k, v, table_LH):
            bias_LH = None if buckets is None else table_LH[: buckets.number]
            more = {"scale": 0.5, "cap": cap, "buckets": buckets, "bias_LH": bias_LH}
            o = attention_core.attention(q, k, v, visible(segment_BS), **more)
            # The random weights give every output a gradient of its own.
            return (o * weight).sum(), o

        gradient_of = jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True)
        (_, o), gradients = jax.jit(gradient_of, compiler_options=QUICK)(q, k, v, table_LH)
        return [np.asarray(z) for z in (o, *gradients)]

    def windowed(segment_BS):
        # Shorter than the documents, so that blocks of queries leave keys out.
        return attention_core.windowed(segment_BS, max(1, S // 5))

    differences: dict[str, float] = {}
    masks = {False: attention_core.causal, True: attention_core.full}
    cases = [(visible, None) for visible in (*masks.values(), windowed)]
    cases += [(masks[buckets.both_ways], buckets) for buckets in biases]
    for visible, buckets in cases:
        have = run(visible, buckets)
        with of_other_platforms():
            want = run(visible, buckets)
        names = ("o", "q", "k", "v") if buckets is None else ("o", "q", "k", "v", "bias")
        for name, a, b in zip(names, want, have, strict=False):
            differences[f"{name}, {visible.__name__}, {buckets}"] = far(a, b, np.abs(a).max())
    _, worst = largest(differences)
    return worst


def _deviation(program: Program, want: Any, have: Any) -> Dense:
    """Returns how far output and gradients are apart; NaN where nothing was served."""
    (want_grads, want_y), (have_grads, have_y) = want, have
    if not np.abs(want_y).max():
        return Dense(np.nan, np.nan, "no assignment was served: the check proves nothing")

    def named(grads):
        of_weights, of_activations = grads
        tree = {"weights": nnx.to_pure_dict(of_weights), "activations": of_activations}
        return program.named(tree)

    where, worst = largest(relative_gradients(named(want_grads), named(have_grads)))
    return Dense(far(want_y, have_y, np.abs(want_y).max()), worst, where)
