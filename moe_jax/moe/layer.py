"""The MoE layer: the one place where a router, a dispatcher and the experts meet, inside one fully
manual shard_map.

Every device routes its own rows, the dispatcher moves tokens over the expert axis, each device
computes its experts with its share of the hidden columns, and one psum over `model` ends the layer.
Expert weights are gathered over `data` inside the manual region: the backward of that gather is a
reduce-scatter. Statistics leave as sums per row, sharded like the batch. Experts may work in a
narrower width than the model's (latent.py).

Rows that are split over `seq` (parallel/context.py) are gathered first, because a group is of whole
rows; each device of `seq` has experts of its own, and a reduce-scatter gives each its own tokens
back.

Shapes: B rows of the global batch, S sequence, T = b S tokens of this device, D model, E experts, F
expert hidden, P = 2 for SwiGLU else 1, N assignments, R rows of a dispatch buffer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.moe import latent, probe, split_rows
from moe_jax.moe.dispatch import DISPATCHERS, chunks
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.exchange import all_gather
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts import narrow
from moe_jax.moe.experts.direct import direct_ffn
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg, Routing, Sizes, Slots, Tokens
from moe_jax.moe.routing.statistics import per_row
from moe_jax.moe.settings import (
    MoE,
    adaptive_state,
    expert_weights,
    num_intended,
    stored_weights,
)
from moe_jax.moe.sparse import stored
from moe_jax.parallel import context
from moe_jax.parallel.mesh import BATCH, P, spec
from moe_jax.precision import wide_dtype
from moe_jax.weights import RouterState, Weights


class Batch(NamedTuple):
    """Holds what a model reads, sharded over rows: arrays, or their specs.

    A router may read all but the last five beside the activations.
    """

    id_BS: Any
    position_BS: Any
    # 0 = padding.
    segment_BS: Any
    row_B: Any
    request: probe.Request = probe.Request()
    # What some kinds of models read, () in the others. Blocks see of these the prefix alone.
    # Not 0 where tokens of a row see each other, whatever their order.
    prefix_BS: Any = ()
    # The Batch that an encoder-decoder's encoder reads.
    source_rows: Any = ()
    # In the place of ids: patches of an image, frames of speech.
    vectors_BSP: Any = ()
    # A bag of features, int32, and their weights; weight 0 = no feature.
    feature_BL: Any = ()
    feature_weight_BL: Any = ()


class MoELayer(nnx.Module):
    """Holds the routed experts of one block, with their router.

    `layer(x_BSD, batch, rng, train) -> (y_BSD, sums)`; sums: {name: [B, ...]} per row, see
    moe/load.py.
    """

    def __init__(self, key: jax.Array, cfg: MoE):
        self.cfg = cfg
        router = ROUTERS[cfg.router]
        sizes = Sizes(cfg.d_model, cfg.num_experts, cfg.vocab_size)
        params = router.params(sizes, cfg.router_options)
        state = router.state(sizes, cfg.router_options) | adaptive_state(cfg)
        # Routers are kept in float32 or wider: rounding moves tokens between experts.
        wide = str(wide_dtype(cfg.param_dtype))
        router_key, state_key, experts_key = (jax.random.fold_in(key, i) for i in range(3))
        self.router = Weights(router_key, params, wide)
        self.state = Weights(state_key, state, wide, RouterState)
        self.experts = Weights(experts_key, expert_weights(cfg), cfg.param_dtype)
        if cfg.latent_dim:
            declared = latent.declare(cfg.d_model, cfg.latent_dim)
            self.latent = Weights(jax.random.fold_in(key, 3), declared, cfg.param_dtype)
        if cfg.stored.block:
            # Constants, so the key draws nothing.
            self.places = Weights(key, stored_weights(cfg)[1], "int32")

    def __call__(self, x_BSD: jax.Array, batch: Batch, rng: jax.Array, train: bool):
        cfg = self.cfg
        axes = {name: weight.names for name, weight in expert_weights(cfg).items()}
        # Cast first, so that the gather over `data` inside moves the narrow dtype.
        experts = {name: self.experts[name].astype(cfg.dtype) for name in axes}
        places = self.places.arrays() if cfg.stored.block else {}
        split = context.is_split(x_BSD)
        tokens_spec = P(BATCH, context.AXIS) if split else P(BATCH)
        # Every device needs the whole router.
        router = {name: jax.sharding.reshard(w, P()) for name, w in self.router.arrays().items()}
        shared = self._latent()
        experts_spec = {name: spec(*names) for name, names in axes.items()}
        places_spec = spec("experts")
        run = jax.shard_map(
            lambda *args: _on_device(*args, cfg=cfg, train=train, split=split),
            # x, the batch, the router, its state, (experts, places, latent), the key.
            in_specs=(tokens_spec, P(BATCH), P(), P(), (experts_spec, places_spec, P()), P()),
            out_specs=(tokens_spec, P(BATCH)),
        )
        with jax.named_scope("moe"):
            return run(x_BSD, batch, router, self.state.arrays(), (experts, places, shared), rng)

    def _latent(self) -> dict[str, jax.Array]:
        """Returns both matrices of latent.py, whole on every device; {} without."""
        if not self.cfg.latent_dim:
            return {}
        with jax.named_scope("gather_weights"):
            narrow = {name: w.astype(self.cfg.dtype) for name, w in self.latent.arrays().items()}
            return {name: jax.sharding.reshard(w, P()) for name, w in narrow.items()}


def _on_device(
    x_BTD, batch: Batch, router, state, weights, rng, *, cfg: MoE, train: bool, split: bool
):
    """Returns (y, sums) of the rows of one device: inside of the shard_map B is b.

    `split`: `x_BTD` is the device's own tokens of rows that are split over `seq`, else whole rows.
    """
    x_BSD = split_rows.whole_rows(x_BTD) if split else x_BTD
    num_rows, row_length, _ = x_BSD.shape
    tokens = _tokens(x_BSD, batch)
    request = batch.request
    sizes = {
        "num_experts": cfg.num_experts,
        # A group never spans a device: one with fewer rows has one group.
        "group_tokens": min(cfg.group_rows, num_rows) * row_length,
    }
    with jax.named_scope("route"):
        # `chosen` is the router's choice, `routing` what the ordering makes of it. A record needs
        # both.
        chosen = _route(tokens, router, state, rng, request, cfg, train)
        routing = chosen
        if isinstance(chosen, Routing):
            routing = ORDERINGS[cfg.ordering].apply(
                chosen,
                **sizes,
                num_tokens=num_rows * row_length,
                options=cfg.ordering_options,
                train=train,
            )
    # Removed after the choice, so no other expert takes the place.
    if isinstance(request.removed, jax.Array):
        chosen = probe.remove(chosen, request.removed, tokens)
        routing = probe.remove(routing, request.removed, tokens)
    *own, shared = weights
    # The width of what travels is the experts': in all that follows D is L where they are latent.
    moved = tokens._replace(x_TD=latent.narrow(tokens.x_TD, shared))
    experts = _experts(own, cfg)
    y_TD, dropped_b, dropped_N = _dispatch(moved, routing, experts, sizes, cfg, split)
    y_BSD = y_TD.reshape(num_rows, row_length, -1)
    with jax.named_scope("combine"):
        y_BTD = latent.widen(split_rows.summed(y_BSD, split), shared)
        # After the sum: every device of `model` has the whole token, and would add it.
        if isinstance(routing, Routing) and routing.copy_T is not None:
            copy_BT = routing.copy_T.astype(y_BTD.dtype).reshape(x_BSD.shape[:2])
            copy_BT = context.own(copy_BT) if split else copy_BT
            y_BTD = y_BTD + copy_BT[:, :, None] * x_BTD
    sums = dict(routing.sums)
    # A router or an ordering may have dropped by itself, before the dispatcher.
    sums["dropped"] = dropped_b + sums["dropped"] if "dropped" in sums else dropped_b
    if cfg.adaptive.rate:
        # A sum over tokens as all others are; a loss divides by the tokens again.
        sums["balance_weight"] = (
            state["balance_weight"].astype(sums["tokens"].dtype) * sums["tokens"]
        )
    sums |= _recorded(request, chosen, routing, dropped_N, tokens, cfg)
    return y_BTD, split_rows.said_once(sums) if split else sums


def _route(
    tokens: Tokens, router, state, rng, request: probe.Request, cfg: MoE, train: bool
) -> Routing | Slots:
    """Returns what the router makes of the tokens of this device."""
    # Barred before the choice, so the router goes round the expert.
    if isinstance(request.barred, jax.Array):
        router, tokens = probe.bar(router, tokens, request.barred)

    def total(z: jax.Array) -> jax.Array:
        return jax.lax.psum(z, BATCH)

    group_rows = min(cfg.group_rows, tokens.num_rows)
    router_cfg = RouterCfg(cfg.num_experts, cfg.router_options, group_rows, cfg.vocab_size, total)
    route = ROUTERS[cfg.router].route
    return route(router, state, tokens, cfg=router_cfg, rng=rng, train=train)


def _recorded(
    request: probe.Request,
    chosen: Routing | Slots,
    routing: Routing | Slots,
    dropped_N: jax.Array,
    tokens: Tokens,
    cfg: MoE,
) -> dict[str, jax.Array]:
    """Returns the record that an instrument asks for, {} where none does."""
    if "gates" in request.record:
        return probe.gates(routing, tokens, cfg.num_experts)
    if not request.record:
        return {}
    if isinstance(routing, Routing) and isinstance(chosen, Routing):
        # An ordering may drop as well: it sends nowhere what was chosen.
        dropped_N = dropped_N | (routing.expert_index_N != chosen.expert_index_N)
    return probe.record(chosen, dropped_N, tokens, request.record, cfg.num_experts)


def _dispatch(
    tokens: Tokens,
    routing: Routing | Slots,
    experts,
    sizes: Mapping[str, int],
    cfg: MoE,
    split: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (y_TD, a partial sum over `model` and `seq`; dropped assignments per row [b]; whether
    each assignment is dropped [N]).
    """
    # Rows that are split over `seq` were gathered, so they vary over it already.
    axes = ("model",) if split else ("model", context.AXIS)

    # Cast here, the gradients are summed over `model` once, as T rows; left to the experts, as the
    # R rows of a buffer.
    def over_model(z: jax.Array) -> jax.Array:
        return jax.lax.pcast(z.astype(tokens.x_TD.dtype), axes, to="varying")

    num_tokens, seq_axis = tokens.x_TD.shape[0], jax.lax.axis_size(context.AXIS)
    all_of_routing = routing
    if isinstance(routing, Routing):
        num_assignments, per_token = routing.expert_index_N.shape[0], routing.per_token
        routing = routing._replace(gate_N=over_model(routing.gate_N))
    else:
        # Each slot of each group is one row for an expert.
        num_groups, _, num_experts, num_slots = routing.dispatch_GtEp.shape
        num_assignments, per_token = num_groups * num_experts * num_slots, 0
        routing = routing._replace(
            dispatch_GtEp=over_model(routing.dispatch_GtEp),
            combine_GtEp=over_model(routing.combine_GtEp),
        )
    if seq_axis > 1:
        routing = split_rows.of_own_experts(routing, cfg.num_experts)
    # Everything is static here: a dispatcher's buffers have their sizes before step 1.
    shape = Shape(
        num_experts=cfg.num_experts // seq_axis,
        group_tokens=sizes["group_tokens"],
        seq_axis=seq_axis,
        num_tokens=num_tokens,
        num_assignments=num_assignments,
        num_intended=num_intended(cfg, num_tokens, num_assignments),
        per_token=per_token,
        expert_axis=jax.lax.axis_size("expert"),
    )
    y_TD, dropped_N = chunks.dispatched(
        DISPATCHERS[cfg.dispatcher],
        *(over_model(tokens.x_TD), routing, experts),
        shape=shape,
        options=cfg.dispatcher_options,
        num_chunks=cfg.overlap_chunks,
    )
    if seq_axis > 1:
        # An assignment is dropped by the device whose expert it is of.
        dropped_N = jax.lax.psum(dropped_N.astype(jnp.int32), context.AXIS) > 0
    if isinstance(all_of_routing, Routing):
        dropped_b = _dropped_per_row(dropped_N, all_of_routing, tokens)
    else:
        dropped_b = jnp.zeros_like(routing.sums["tokens"])
    return y_TD, dropped_b, dropped_N


def _tokens(x_BSD: jax.Array, batch: Batch) -> Tokens:
    """Returns the rows of this device as one list of tokens, T = b S."""
    num_rows, row_length, d_model = x_BSD.shape
    num_tokens = num_rows * row_length

    def flat(z_BS: jax.Array) -> jax.Array:
        return z_BS.reshape(num_tokens)

    def flat_choices(z_BSK: jax.Array) -> jax.Array:
        return z_BSK.reshape(num_tokens, -1)

    segment_T = flat(batch.segment_BS)
    return Tokens(
        x_TD=x_BSD.reshape(num_tokens, d_model),
        id_T=flat(batch.id_BS),
        position_T=flat(batch.position_BS),
        row_T=jnp.repeat(batch.row_B, row_length),
        segment_T=segment_T,
        valid_T=segment_T > 0,
        num_rows=num_rows,
        recorded=jax.tree.map(flat_choices, batch.request.recorded),
    )


def _experts(parts: Sequence[Mapping[str, jax.Array]], cfg: MoE) -> Experts:
    """Returns the experts of this device."""
    weights, places = parts
    if places:
        return Experts(stored.experts(weights, places, cfg.chosen))
    with jax.named_scope("gather_experts"):
        # D is split over `data`: dimension 1 of w_in [E, D, P, F], and 2 of w_out [E, F, D].
        w_in_eDPF = all_gather(weights["w_in"], "data", 1)
        w_out_eFD = all_gather(weights["w_out"], "data", 2)

    biases = None
    if cfg.expert_bias:
        # Each device of `model` has a part of a sum, of which one has the bias.
        first = (jax.lax.axis_index("model") == 0).astype(weights["out_bias"].dtype)
        biases = (weights["in_bias"], weights["out_bias"] * first)

    def grouped(x_RD, gate_R, start_e, size_e, block):
        with jax.named_scope("experts"):
            return expert_ffn(
                *(x_RD, gate_R, start_e, size_e, w_in_eDPF, w_out_eFD),
                activation=cfg.activation,
                options=cfg.activation_options,
                block=block,
                biases=biases,
                kernel=cfg.expert_kernel,
                numbers=cfg.numbers,
            )

    def direct(x_TD, token_M, expert_index_M, gate_M):
        with jax.named_scope("experts"):
            assignments = (token_M, expert_index_M, gate_M)
            return direct_ffn(x_TD, *assignments, w_in_eDPF, w_out_eFD, chosen=cfg.chosen)

    # The direct way knows no biases, and no narrow numbers.
    has_direct = not cfg.expert_bias and cfg.numbers == narrow.FULL
    return Experts(grouped, direct if has_direct else None)


def _dropped_per_row(dropped_N: jax.Array, routing: Routing, tokens: Tokens) -> jax.Array:
    """Returns how many assignments of each row are dropped, [b]."""
    count_N = dropped_N.astype(routing.sums["tokens"].dtype)
    num_tokens = tokens.valid_T.shape[0]
    if routing.per_token:
        # The list is [T, K] here: no scatter is needed.
        return per_row(count_N.reshape(num_tokens, -1).sum(-1), tokens)
    zero_T = jnp.zeros_like(count_N, shape=(num_tokens,))
    return per_row(zero_T.at[routing.token_N].add(count_N, mode="drop"), tokens)
