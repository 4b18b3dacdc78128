"""What a router is, reads and returns.

Shapes: T tokens of this device, N assignments, b rows (sequences) of this device, D model, E
experts, K choices of a token, C classes that are counted (E, or E + null experts), G groups of this
device, p slots of one expert in one group.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.weights import Weight

Arrays = Mapping[str, jax.Array]
# the logit of a barred expert (moe/probe.py): it comes after all others, whatever is added to its
# score
NEVER = -1e9


class Sizes(NamedTuple):
    """Holds what the shapes of a router's weights may depend on."""

    d_model: int
    num_experts: int
    vocab_size: int


class Sees(NamedTuple):
    """Holds what may change the output of a token, beside the token itself and earlier tokens of
    its sequence.
    """

    future: bool  # later tokens of the sequence
    batch: bool  # other sequences


class Declared(NamedTuple):
    """Holds what a router promises of its routing; tests/moe/routing/test_routers.py holds every
    router to it.
    """

    most: int | None  # assignments of a token at most; None: no bound
    exact: bool  # every valid token has exactly `most`
    gate_sum: float | None  # of a valid token's gates; None: free
    # Experts that compute for a token, when the load is as intended; None: `most`, or all.
    average: float | None = None
    # A choice of no expert may copy the token into its output.
    copies: bool = False


class Setting(NamedTuple):
    """Holds what a router's refusals may depend on beside its own options."""

    at: str  # the path of its block in the config
    num_experts: int
    batch_size: int  # rows of an optimizer step
    micro_batch_size: int


def no_weights(sizes: Sizes, options: Any) -> dict[str, Weight]:
    """Declares nothing: for a router without parameters, or without state."""
    del sizes, options
    return {}


def linear_gate(sizes: Sizes, options: Any) -> dict[str, Weight]:
    """Declares the parameters of most routers: one matrix [D, E]."""
    del options
    gate = Weight((sizes.d_model, sizes.num_experts), ("embed", None), sizes.d_model**-0.5)
    return {"gate": gate}


def keep_state(state: Arrays, totals: Arrays, cfg: "RouterCfg") -> Arrays:
    """Returns the state as it was: the update of a router whose state never changes."""
    del totals, cfg
    return state


def sees_nothing(options: Any) -> Sees:
    """Says that a router decides token by token."""
    del options
    return Sees(future=False, batch=False)


def nothing_balances(options: Any) -> str:
    """Says that a router has no balance of its own, so that it needs a loss."""
    del options
    return ""


def no_slots(options: Any) -> int:
    """Says that a router assigns tokens to experts, and mixes none into slots."""
    del options
    return 0


def one_gate(options: Any) -> int:
    """Says that a router has the same gate for all tokens."""
    del options
    return 0


def no_refusals(options: Any, setting: Setting) -> Iterator[str]:
    """Refuses nothing: every value within its bounds goes with every other."""
    del options, setting
    yield from ()


def softmax_scores(options: Any) -> Callable[[jax.Array], jax.Array]:
    """Says that a router ranks experts by the softmax of its logits."""
    del options
    return jax.nn.softmax


class Router(NamedTuple):
    """All that there is to know of a router; `ROUTER` of its file. `options` is one of its Options.

    What has no default would be silently wrong if it were forgotten.
    """

    # The frozen dataclass of its block in the config (schema/options.py).
    options: type
    # (params, state, tokens, *, cfg, rng, train) -> Routing | Slots, on the tokens of one device.
    route: Callable[..., Any]
    # What a token's output may depend on in training: a causal model refuses what sees the future.
    sees: Callable[[Any], Sees]
    # (num_experts, options) -> what its routing promises.
    declared: Callable[[int, Any], Declared]
    # Weights with a gradient, and without one: a bias, quantiles, a coefficient.
    params: Callable[[Sizes, Any], dict[str, Weight]] = linear_gate
    state: Callable[[Sizes, Any], dict[str, Weight]] = no_weights
    # (state, totals of the step, cfg) of one layer -> state; once per optimizer step.
    update: Callable[[Arrays, Arrays, "RouterCfg"], Arrays] = keep_state
    # It fixes the capacity of its experts itself, so no dispatcher may drop a second time.
    own_capacity: bool = False
    # What balances its load without a loss, in words; "" = nothing does.
    balanced_by: Callable[[Any], str] = nothing_balances
    # Balance losses that its paper has beside `balanced_by`, and the other losses that it has not.
    losses: tuple[str, ...] = ()
    no_losses: tuple[str, ...] = ()
    # Sums per row that it gives beside those of `statistics`, for losses that need them.
    sums: tuple[str, ...] = ()
    # It adds a loss of its own, whose coefficient is its state: sums "l1_load" and "l1_weight".
    own_loss: bool = False
    # Slots of an expert in a group, of a router that mixes tokens; 0 = it makes assignments.
    num_slots: Callable[[Any], int] = no_slots
    # Gates of a router that has one for each task; 0 = it has one for all tokens.
    num_gates: Callable[[Any], int] = one_gate
    # It replays a recording that the batch carries, so only instruments can use it.
    replays: bool = False
    # logits -> the scores by which it ranks experts, for instruments that replay or perturb it.
    score: Callable[[Any], Callable[[jax.Array], jax.Array]] = softmax_scores
    # Yields what is wrong with its options together, one sentence each.
    refusals: Callable[[Any, Setting], Iterator[str]] = no_refusals


class Tokens(NamedTuple):
    """Holds what a router may read, one entry per token of this device; rows are contiguous runs of
    T / num_rows tokens.
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
    """Holds what every router is told."""

    num_experts: int
    options: Any  # of its own block in the config: one of its Options
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
