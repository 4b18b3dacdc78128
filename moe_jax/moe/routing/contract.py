"""What a router is, reads and returns.

Shapes: T tokens of this device, N assignments, b rows (sequences) of this device, D model, E
experts, K choices of a token, C classes that are counted (E, or E + null experts), G groups of this
device, p slots of one expert in one group.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.weights import Weight

Arrays = Mapping[str, jax.Array]
# the logit of a barred expert (moe/probe.py): it comes after all others, whatever is added to its
# score
NEVER = -1e9


class Sizes(NamedTuple):
    """What the shapes of a router's weights may depend on."""

    d_model: int
    num_experts: int
    vocab_size: int


class Sees(NamedTuple):
    """What may change the output of a token, beside the token itself and earlier tokens of its
    sequence.
    """

    future: bool  # later tokens of the sequence
    batch: bool  # other sequences


class Declared(NamedTuple):
    """What a router promises of its routing; tests/moe/routing/test_routers.py holds every router
    to it.
    """

    most: int | None  # assignments of a token at most; None: no bound
    exact: bool  # every valid token has exactly `most`
    gate_sum: float | None  # of a valid token's gates; None: free
    average: float | None = (
        None  # experts that compute for a token, when the load is as intended; None: `most`, or all
    )


class Router(NamedTuple):
    """One ROUTERS line. `options` is the router's own block of the config."""

    params: Callable[[Sizes, Mapping[str, Any]], dict[str, Weight]]
    state: Callable[
        [Sizes, Mapping[str, Any]], dict[str, Weight]
    ]  # without gradient: a bias, quantiles, a coefficient
    route: Callable[..., Any]  # (params, state, tokens, *, cfg, rng, train) -> Routing | Slots
    update: Callable[
        [Arrays, Arrays, "RouterCfg"], Arrays
    ]  # (state, totals of the step, cfg) of one layer -> state
    sees: Callable[[Mapping[str, Any]], Sees]
    declared: Callable[[int, Mapping[str, Any]], Declared]  # (num_experts, options)
    # fixes its own capacity: never dropped a second time, so it needs the dropless dispatcher
    own_capacity: bool = False


class Tokens(NamedTuple):
    """What a router may read, one entry per token of this device; rows are contiguous runs of T /
    num_rows tokens.
    """

    x_TD: jax.Array
    id_T: jax.Array
    position_T: jax.Array
    row_T: (
        jax.Array
    )  # global row id, carried by the batch: randomness folds it in, never a device index
    segment_T: jax.Array
    valid_T: jax.Array  # False for padding
    num_rows: int
    recorded: Any = ()  # (expert_TK, gate_TK) of a recording for this layer, or nothing


class Routing(NamedTuple):
    """Assignments in order of priority: earlier ones win capacity.

    `expert_N == E` goes nowhere (padding, an unused place, null).
    """

    token_N: jax.Array
    expert_N: jax.Array
    gate_N: jax.Array
    # per row: see `statistics`; what a router or an ordering drops by itself is counted in
    # "dropped" [b]
    sums: Arrays
    per_token: int  # k > 0: token_N is exactly 0,0,..(k times),1,1,..; 0: any order, any number
    order_N: jax.Array | None = (
        None  # the entries in order of priority, where that is not the order of the list
    )
    copy_T: jax.Array | None = (
        None  # weight of the token itself in its output (null experts that copy)
    )


class Slots(NamedTuple):
    """Mixtures instead of assignments (soft MoE): slot s of expert e takes sum_t dispatch[t] x_t,
    token t gets sum combine y.
    """

    dispatch_GtEp: jax.Array
    combine_GtEp: jax.Array
    sums: Arrays


class RouterCfg(NamedTuple):
    """What every router is told."""

    num_experts: int
    options: Mapping[str, Any]  # of its own block in the config
    group_rows: int  # rows of a group: what balances or selects over tokens does so inside a group
    vocab_size: int
    # Sums over the devices of the batch, for a router that balances over the whole micro-batch (it
    # sees_batch).
    total: Callable[[jax.Array], jax.Array]


def per_row(x_T: jax.Array, tokens: Tokens) -> jax.Array:
    """Sums a per-token statistic [T, ...] over the tokens of each row: [b, ...]."""
    return x_T.reshape((tokens.num_rows, -1) + x_T.shape[1:]).sum(1)


def uniform(rng: jax.Array, tokens: Tokens, num: int, dtype: Any) -> jax.Array:
    """[T, num] uniform numbers in [0, 1) that depend on the row and the place in it, so they are
    the same on every mesh.
    """
    return _draw(jax.random.uniform, rng, tokens, num, dtype)


def normal(rng: jax.Array, tokens: Tokens, num: int, dtype: Any) -> jax.Array:
    """[T, num] standard normal numbers, the same on every mesh as those of `uniform`."""
    return _draw(jax.random.normal, rng, tokens, num, dtype)


def _draw(
    sample: Callable[..., jax.Array], rng: jax.Array, tokens: Tokens, num: int, dtype: Any
) -> jax.Array:
    length = tokens.row_T.shape[0] // tokens.num_rows

    def draw(row):
        return sample(jax.random.fold_in(rng, row), (length, num), dtype)

    return jax.vmap(draw)(tokens.row_T[::length]).reshape(-1, num)


def statistics(
    logits_TC: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    tokens: Tokens,
    *,
    probs_TC: jax.Array | None = None,
    real_TK: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The sums per row that every load-balancing loss and every load metric is made of; padding
    counts nowhere.

    Args:
      logits_TC: scores before any normalisation, for z = logsumexp(logits)^2.
      expert_TK: the chosen classes.
      gate_TK: their gates.
      probs_TC: what the router calls a token's distribution over classes; softmax(logits) unless
          given.
      real_TK: which choices exist, where a token may have fewer than K.

    Returns:
      counts [b, C] assignments; first [b, C] of them those that are a token's first choice; probs
      [b, C] of `probs_TC`, with a gradient; importance [b, C] of the gates, with a gradient
      (Shazeer et al. 2017, eq. 6); z, entropy (nats), gate (sum of a token's gates), gate_max,
      tokens: [b].
    """
    hit_TKC = expert_TK[:, :, None] == jnp.arange(logits_TC.shape[1])[None, None, :]
    if real_TK is not None:
        hit_TKC = hit_TKC & real_TK[:, :, None]
    gate_TC = jnp.where(hit_TKC, gate_TK.astype(logits_TC.dtype)[:, :, None], 0).sum(1)
    return class_statistics(
        logits_TC, hit_TKC.sum(1), gate_TC, tokens, probs_TC=probs_TC, first_TC=hit_TKC[:, 0]
    )


def class_statistics(
    logits_TC: jax.Array,
    hit_TC: jax.Array,
    gate_TC: jax.Array,
    tokens: Tokens,
    *,
    probs_TC: jax.Array | None = None,
    first_TC: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """`statistics` of a router that has no list of choices for each token: whether (or how much)
    each class counts, and its gate, [T, C].

    first_TC: what counts as the first choice; the largest gate among those that count unless given.
    """
    wide = logits_TC.dtype
    valid_T = tokens.valid_T.astype(wide)
    if first_TC is None:
        best_TC = jnp.argmax(gate_TC, 1)[:, None] == jnp.arange(gate_TC.shape[1])[None]
        first_TC = best_TC & (hit_TC != 0)
    probs_TC = jax.nn.softmax(logits_TC) if probs_TC is None else probs_TC
    share_TC = probs_TC / jnp.maximum(probs_TC.sum(-1, keepdims=True), 1e-30)
    entropy_T = -(share_TC * jnp.log(jnp.maximum(share_TC, 1e-30))).sum(-1)
    z_T = jax.nn.logsumexp(logits_TC, -1) ** 2

    def rows(x_TC):
        return per_row(x_TC.astype(wide) * valid_T.reshape((-1,) + (1,) * (x_TC.ndim - 1)), tokens)

    return {
        "counts": rows(jax.lax.stop_gradient(hit_TC)),
        "first": rows(first_TC),
        "probs": rows(probs_TC),
        "importance": rows(gate_TC),
        "z": rows(z_T),
        "entropy": rows(jax.lax.stop_gradient(entropy_T)),
        "gate": rows(jax.lax.stop_gradient(gate_TC.sum(-1))),
        "gate_max": rows(jax.lax.stop_gradient(gate_TC.max(-1))),
        "tokens": per_row(valid_T, tokens),
    }


def token_choice(
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    sums: Arrays,
    tokens: Tokens,
    num_experts: int,
    real_TK: Any = None,
) -> Routing:
    """The Routing of K choices per token in token order; padding, and classes from E on, go nowhere
    and have a zero gate.
    """
    k = expert_TK.shape[1]
    goes_TK = tokens.valid_T[:, None] & (expert_TK < num_experts)
    goes_TK = goes_TK if real_TK is None else goes_TK & real_TK
    return Routing(
        token_N=jnp.repeat(jnp.arange(expert_TK.shape[0], dtype=jnp.int32), k),
        expert_N=jnp.where(goes_TK, expert_TK, num_experts).reshape(-1).astype(jnp.int32),
        gate_N=jnp.where(goes_TK, gate_TK, 0).reshape(-1),
        sums=sums,
        per_token=k,
    )


def even(expert_TK: jax.Array, tokens: Tokens, cfg: RouterCfg) -> Routing:
    """`token_choice` with gates 1 / k, without logits: probabilities are uniform, and z is 0 rather
    than the log E of all-equal ones.
    """
    wide = jnp.promote_types(tokens.x_TD.dtype, jnp.float32)
    gate_TK = jnp.full(expert_TK.shape, 1 / expert_TK.shape[1], wide)
    sums = statistics(
        jnp.zeros((expert_TK.shape[0], cfg.num_experts), wide), expert_TK, gate_TK, tokens
    )
    return token_choice(
        expert_TK, gate_TK, {**sums, "z": jnp.zeros_like(sums["z"])}, tokens, cfg.num_experts
    )


def router_logits(x_TD: jax.Array, gate_DE: jax.Array) -> jax.Array:
    """x W in at least float32, whatever the model computes in: rounding here moves tokens between
    experts.
    """
    wide = jnp.promote_types(x_TD.dtype, jnp.float32)
    return jnp.einsum(
        "TD,DE->TE", x_TD.astype(wide), gate_DE.astype(wide), precision=jax.lax.Precision.HIGHEST
    )


def no_weights(sizes: Sizes, options: Mapping[str, Any]) -> dict[str, Weight]:
    """For a router without parameters, or without state."""
    del sizes, options
    return {}


def linear_gate(sizes: Sizes, options: Mapping[str, Any]) -> dict[str, Weight]:
    """The parameters of most routers: one matrix [D, E]."""
    del options
    return {
        "gate": Weight((sizes.d_model, sizes.num_experts), ("embed", None), sizes.d_model**-0.5)
    }


def keep_state(state: Arrays, totals: Arrays, cfg: RouterCfg) -> Arrays:
    """The update of a router whose state never changes."""
    del totals, cfg
    return state


def sees_nothing(options: Mapping[str, Any]) -> Sees:
    """Of a router that decides token by token."""
    del options
    return Sees(future=False, batch=False)
