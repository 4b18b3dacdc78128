"""The MoE layer: the one place where a router, a dispatcher and the experts meet, inside one fully
manual shard_map.

Every device routes its own rows, the dispatcher moves tokens over the expert axis, each device
computes its experts with its share of the hidden columns, and one psum over `model` ends the layer.
Expert weights are gathered over `data` inside the manual region: the backward of that gather is a
reduce-scatter. Statistics leave as sums per row, sharded like the batch.

Shapes: B rows of the global batch, S sequence, T = b S tokens of this device, D model, E experts, F
expert hidden, P = 2 for SwiGLU else 1, N assignments, R rows of a dispatch buffer.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.moe import probe
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.dispatch.exchange import all_gather
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg, Routing, Sizes, Slots, Tokens
from moe_jax.moe.routing.statistics import per_row
from moe_jax.moe.sparse import stored
from moe_jax.parallel.mesh import BATCH, P, spec
from moe_jax.precision import wide_dtype
from moe_jax.schema.config import AdaptiveConfig, StoredConfig
from moe_jax.weights import RouterState, Weight, Weights


@dataclasses.dataclass(frozen=True)
class MoE:
    """Holds what the layer is told: the config's `model.moe` block, and what it shares with the
    rest of the model.
    """

    num_experts: int
    group_rows: int
    router: str
    router_options: Any
    ordering: str
    ordering_options: Any
    adaptive: AdaptiveConfig
    vocab_size: int
    dispatcher: str
    dispatcher_options: Any
    d_model: int
    expert_hidden: int
    activation: str
    param_dtype: str
    dtype: str
    out_std: float  # of the first value of w_out
    # {block, w_in, w_out}: experts as blocks (sparse/stored.py); block 0 = whole matrices
    stored: StoredConfig  # experts as blocks (sparse/stored.py); block 0 = whole matrices


class Batch(NamedTuple):
    """Holds what a model reads, sharded over rows; a router may read all but the last five beside
    the activations.
    """

    id_BS: Any  # arrays; or their specs
    position_BS: Any
    segment_BS: Any  # 0 = padding
    row_B: Any
    request: probe.Request = probe.Request()
    # What some kinds of models read, () in the others. Blocks see of these the prefix alone.
    prefix_BS: Any = ()  # not 0 where tokens of a row see each other, whatever their order
    source_rows: Any = ()  # the Batch that an encoder-decoder's encoder reads
    vectors_BSP: Any = ()  # in the place of ids: patches of an image, frames of speech
    feature_BL: Any = ()  # int32: of a bag of features
    feature_weight_BL: Any = ()  # 0 = no feature


class MoELayer(nnx.Module):
    """Routed experts.

    `layer(x_BSD, batch, rng, train) -> (y_BSD, sums)`; sums: {name: [B, ...]} per row, see
    moe/load.py.
    """

    def __init__(self, key: jax.Array, cfg: MoE):
        self.cfg = cfg
        router = ROUTERS[cfg.router]
        declared = (Sizes(cfg.d_model, cfg.num_experts, cfg.vocab_size), cfg.router_options)
        wide = str(wide_dtype(cfg.param_dtype))
        self.router = Weights(jax.random.fold_in(key, 0), router.params(*declared), wide)
        self.state = Weights(
            jax.random.fold_in(key, 1),
            router.state(*declared) | adaptive_state(cfg),
            wide,
            RouterState,
        )
        self.experts = Weights(jax.random.fold_in(key, 2), expert_weights(cfg), cfg.param_dtype)
        if cfg.stored.block:
            self.places = Weights(key, _stored(cfg)[1], "int32")

    def __call__(self, x_BSD: jax.Array, batch: Batch, rng: jax.Array, train: bool):
        cfg = self.cfg
        axes = {name: weight.names for name, weight in expert_weights(cfg).items()}
        experts = {name: self.experts[name].astype(cfg.dtype) for name in axes}
        places = self.places.arrays() if cfg.stored.block else {}
        router = {name: jax.sharding.reshard(w, P()) for name, w in self.router.arrays().items()}
        run = jax.shard_map(
            lambda *args: _on_device(*args, cfg=cfg, train=train),
            in_specs=(
                P(BATCH),
                P(BATCH),
                P(),
                P(),
                ({n: spec(*names) for n, names in axes.items()}, P("expert")),
                P(),
            ),
            out_specs=(P(BATCH), P(BATCH)),
        )
        with jax.named_scope("moe"):
            return run(x_BSD, batch, router, self.state.arrays(), (experts, places), rng)


def expert_weights(cfg: MoE) -> dict[str, Weight]:
    """Gate and up are an axis of their own, so that F can be split over `model` without pairing
    wrong columns.
    """
    e, d, f, p = (
        cfg.num_experts,
        cfg.d_model,
        cfg.expert_hidden,
        2 if cfg.activation == "swiglu" else 1,
    )
    if cfg.stored.block:
        return _stored(cfg)[0]
    return {
        "w_in": Weight((e, d, p, f), ("experts", "expert_embed", None, "hidden"), d**-0.5),
        "w_out": Weight((e, f, d), ("experts", "hidden", "expert_embed"), cfg.out_std),
    }


def _stored(cfg: MoE) -> tuple[dict[str, Weight], dict[str, Weight]]:
    outputs = stored.outputs(cfg.d_model, cfg.expert_hidden, cfg.activation)
    return stored.declare(cfg.stored, cfg.num_experts, outputs)


def adaptive_state(cfg: MoE) -> dict[str, Weight]:
    """The weight of the balance losses where the drop rate drives it (`losses.adapt`)."""
    return {"balance_weight": Weight((), (), 0.0, 1.0)} if cfg.adaptive.rate else {}


def _on_device(x_BSD, batch: Batch, router, state, weights, rng, *, cfg: MoE, train: bool):
    b, s, d = x_BSD.shape
    tokens = _tokens(x_BSD, batch)
    seen, request = (router, tokens), batch.request
    if isinstance(request.barred, jax.Array):
        seen = probe.bar(router, tokens, request.barred)
    with jax.named_scope("route"):

        def total(z):
            return jax.lax.psum(z, BATCH)

        router_cfg = RouterCfg(
            cfg.num_experts, cfg.router_options, min(cfg.group_rows, b), cfg.vocab_size, total
        )
        routing = ROUTERS[cfg.router].route(
            seen[0], state, seen[1], cfg=router_cfg, rng=rng, train=train
        )
        chosen, sizes = (
            routing,
            {"num_experts": cfg.num_experts, "group_tokens": min(cfg.group_rows, b) * s},
        )
        if isinstance(routing, Routing):
            ordering = {"num_tokens": b * s, "options": cfg.ordering_options, "train": train}
            routing = ORDERINGS[cfg.ordering].apply(routing, **sizes, **ordering)
    if isinstance(request.removed, jax.Array):
        chosen, routing = (probe.remove(z, request.removed, tokens) for z in (chosen, routing))
    y_TD, dropped_b, dropped_N = _dispatch(tokens, routing, _experts(weights, cfg), sizes, cfg)
    with jax.named_scope("combine"):
        y_TD = jax.lax.psum(y_TD, "model")
        if isinstance(routing, Routing) and routing.copy_T is not None:
            y_TD = y_TD + routing.copy_T.astype(y_TD.dtype)[:, None] * tokens.x_TD
    sums = dict(routing.sums, dropped=dropped_b + routing.sums.get("dropped", 0))
    if cfg.adaptive.rate:
        sums["balance_weight"] = state["balance_weight"] * sums["tokens"]
    if "gates" in request.record:
        sums |= probe.gates(routing, tokens, cfg.num_experts)
    elif request.record:
        # An ordering may drop as well: it sends nowhere what was chosen.
        if isinstance(routing, Routing) and isinstance(chosen, Routing):
            dropped_N = dropped_N | (routing.expert_index_N != chosen.expert_index_N)
        sums |= probe.record(chosen, dropped_N, tokens, request.record, cfg.num_experts)
    return y_TD.reshape(b, s, d), sums


def _dispatch(
    tokens: Tokens, routing: Routing | Slots, experts, sizes: Mapping[str, int], cfg: MoE
):
    """(y_TD, a partial sum over `model`; dropped assignments per row [b], and of each assignment
    [N]).
    """

    # Cast here, the gradients are summed over `model` once, as T rows; left to the experts, as the
    # R rows of a buffer.
    def over_model(z):
        return jax.lax.pcast(z.astype(tokens.x_TD.dtype), "model", to="varying")

    assigned = isinstance(routing, Routing)
    num_places = (
        routing.expert_index_N.shape[0]
        if assigned
        else routing.dispatch_GtEp.size // routing.dispatch_GtEp.shape[1]
    )
    shape = Shape(
        **sizes,
        num_tokens=tokens.x_TD.shape[0],
        num_assignments=num_places,
        num_intended=num_intended(cfg, tokens.x_TD.shape[0], num_places),
        per_token=routing.per_token if assigned else 0,
        expert_axis=jax.lax.axis_size("expert"),
    )
    weighted = ("gate_N",) if assigned else ("dispatch_GtEp", "combine_GtEp")
    routing = routing._replace(**{name: over_model(getattr(routing, name)) for name in weighted})
    dispatcher = DISPATCHERS[cfg.dispatcher]
    y_TD, dropped_N = dispatcher.apply(
        over_model(tokens.x_TD), routing, experts, shape=shape, options=cfg.dispatcher_options
    )
    if isinstance(routing, Routing):
        return y_TD, _dropped_per_row(dropped_N, routing, tokens), dropped_N
    dropped_b = jnp.zeros_like(routing.sums["tokens"])
    return y_TD, dropped_b, dropped_N


def num_intended(cfg: MoE, num_tokens: int, num_places: int) -> int:
    """How many of the places that a router may fill it fills when the load is as it intends;
    padding counts as tokens.
    """
    average = ROUTERS[cfg.router].declared(cfg.num_experts, cfg.router_options).average
    return num_places if average is None else min(num_places, math.ceil(average * num_tokens))


def _tokens(x_BSD: jax.Array, batch: Batch) -> Tokens:
    b, s, d = x_BSD.shape

    def flat(z_BS):
        return z_BS.reshape(b * s)

    row_T = jnp.repeat(batch.row_B, s)
    valid_T = flat(batch.segment_BS) > 0
    ids = (flat(batch.id_BS), flat(batch.position_BS), row_T, flat(batch.segment_BS))
    recorded = jax.tree.map(lambda z_BSK: z_BSK.reshape(b * s, -1), batch.request.recorded)
    return Tokens(x_BSD.reshape(b * s, d), *ids, valid_T, num_rows=b, recorded=recorded)


def _experts(parts: tuple[Mapping[str, jax.Array], ...], cfg: MoE) -> Callable[..., jax.Array]:
    """The experts of this device as a function of grouped rows; their weights are gathered over
    `data` here.
    """
    weights, places = parts
    if places:
        return stored.experts(weights, places, cfg.activation)
    with jax.named_scope("gather_experts"):
        w_in = all_gather(weights["w_in"], "data", 1)
        w_out = all_gather(weights["w_out"], "data", 2)

    def experts(x_RD, gate_R, start_e, size_e, block):
        with jax.named_scope("experts"):
            rows = (x_RD, gate_R, start_e, size_e)
            return expert_ffn(*rows, w_in, w_out, activation=cfg.activation, block=block)

    return experts


def _dropped_per_row(dropped_N: jax.Array, routing: Routing, tokens: Tokens) -> jax.Array:
    counted_N = dropped_N.astype(routing.sums["tokens"].dtype)
    num_tokens = tokens.valid_T.shape[0]
    if routing.per_token:
        return per_row(counted_N.reshape(num_tokens, -1).sum(-1), tokens)
    zero_T = jnp.zeros_like(counted_N, shape=(num_tokens,))
    return per_row(zero_T.at[routing.token_N].add(counted_N, mode="drop"), tokens)
