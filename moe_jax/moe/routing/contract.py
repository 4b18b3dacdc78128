"""What a router is, reads and returns.

Shapes: T tokens of this device, N assignments, b rows (sequences) of this device, D model, E
experts, K choices of a token, C classes that are counted (E, or E + null experts), G groups of this
device, t tokens of a group, p slots of one expert in one group.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.precision import wide_dtype
from moe_jax.weights import Weight

Arrays = Mapping[str, jax.Array]
# The logit of an expert that an instrument bars (moe/probe.py). It lies below every real logit,
# whatever bias or noise a router adds.
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

    # Later tokens of the sequence.
    future: bool
    # Other sequences.
    batch: bool


class Declared(NamedTuple):
    """Holds what a router promises of its routing; tests/moe/routing/test_routers.py holds every
    router to it.
    """

    # Assignments of a token at most; None: no bound.
    most: int | None
    # Every valid token has exactly `most`.
    exact: bool
    # The sum of a valid token's gates; None: free.
    gate_sum: float | None
    # Experts that compute for a token, when the load is as intended; None: `most`, or all.
    average: float | None = None
    # A choice of no expert may copy the token into its output.
    copies: bool = False


class Setting(NamedTuple):
    """Holds what a router's refusals may depend on beside its own options."""

    # The path of its block in the config, which messages name.
    at: str
    num_experts: int
    # Rows of an optimizer step.
    batch_size: int
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


def as_they_are(options: Any) -> Any:
    """Says that options which differ make routings that differ."""
    return options


def as_given(num_experts: int, options: Any) -> Any:
    """Says that no option follows from the number of experts."""
    del num_experts
    return options


def times_k(options: Any, n: int) -> Any:
    """Returns options by which a token takes n times `k` experts."""
    return dataclasses.replace(options, k=n * options.k)


def never_multiplied(options: Any, n: int) -> Any:
    """Says that a token's number of experts cannot be changed."""
    del options, n
    return None


def any_number(options: Any, index: Sequence[int], num_experts: int) -> str:
    """Says that an expert may have any number."""
    del options, index, num_experts
    return ""


def by_number(options: Any, index: Sequence[int], num_experts: int) -> str:
    """Says that a router sends tokens to numbers, so that experts keep theirs."""
    del options
    same = list(index) == list(range(num_experts))
    return "" if same else "it sends tokens to experts by their numbers, whatever they have learned"


def never_silenced(options: Any, state: Any, new: Any) -> None:
    """Says that no state keeps an expert from being chosen."""
    del options, state, new
    return None


class Router(NamedTuple):
    """Holds all that there is to know of a router; `ROUTER` of its file. `options` is one of its
    Options.

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
    # options -> options of the same routing at evaluation, up to rounding, in one form.
    normal_form: Callable[[Any], Any] = as_they_are
    # Yields what is wrong with its options together, one sentence each.
    refusals: Callable[[Any, Setting], Iterator[str]] = no_refusals
    # What surgery on experts asks (moe_jax/surgery).
    # (num_experts, options) -> the options, with those written out that follow from the number.
    fixed: Callable[[int, Any], Any] = as_given
    # (options, n) -> options by which each choice becomes n, among n times the experts; None =
    # there are none.
    multiplied: Callable[[Any, int], Any] = never_multiplied
    # (options, the old number of each new expert, old number of experts) -> why experts cannot get
    # these numbers; "" = they can.
    renumbered: Callable[[Any, Sequence[int], int], str] = any_number
    # (options, state, which experts are new, bool [E]), NumPy arrays -> the state by which those
    # are not chosen and all else is as before; None = there is none.
    silenced: Callable[[Any, Any, Any], Any] = never_silenced


class Tokens(NamedTuple):
    """Holds what a router may read, one entry per token of this device.

    Rows are contiguous runs of T / num_rows tokens.
    """

    x_TD: jax.Array
    id_T: jax.Array
    position_T: jax.Array
    # The global number of the row, which the batch carries. Random numbers fold it in, never the
    # index of a device, so that every mesh draws the same.
    row_T: jax.Array
    segment_T: jax.Array
    # False for padding.
    valid_T: jax.Array
    num_rows: int
    # (expert_index_TK, gate_TK) of a recording for this layer, or nothing.
    recorded: Any = ()


class Routing(NamedTuple):
    """Holds assignments of tokens to experts in order of priority: earlier ones win capacity.

    `expert_index_N == E` goes nowhere: padding, an unused place, a null expert.
    """

    token_N: jax.Array
    expert_index_N: jax.Array
    gate_N: jax.Array
    # Sums per row: those of moe/routing/statistics.py, and of `Router.sums`. What a router or an
    # ordering drops by itself is counted in "dropped" [b].
    sums: Arrays
    # k > 0: token_N is exactly 0, 0, .. (k times), 1, 1, ..; 0: any order, any number.
    per_token: int
    # The entries in order of priority, where that is not the order of the list.
    order_N: jax.Array | None = None
    # The weight of the token itself in its output, of null experts that copy.
    copy_T: jax.Array | None = None


class Slots(NamedTuple):
    """Holds mixtures instead of assignments (soft MoE).

    Slot p of expert e takes the sum over t of dispatch[t, e, p] x_t. Token t gets the sum over e
    and p of combine[t, e, p] times what expert e makes of slot p.
    """

    dispatch_GtEp: jax.Array
    combine_GtEp: jax.Array
    sums: Arrays


class RouterCfg(NamedTuple):
    """Holds what every router is told."""

    num_experts: int
    # Those of its own block in the config: one of its Options.
    options: Any
    # Rows of a group: what balances or selects over tokens does so inside a group.
    group_rows: int
    vocab_size: int
    # Sums over the devices of the batch, for a router that balances over the whole micro-batch
    # (`Sees.batch`).
    total: Callable[[jax.Array], jax.Array]
    # Mean over the MoE layers of the model, for an update that looks at all of them; a layer alone
    # is its own mean.
    mean_over_layers: Callable[[jax.Array], jax.Array] = lambda z: z


def router_logits(x_TD: jax.Array, gate_DE: jax.Array) -> jax.Array:
    """Returns x W [T, E] in at least float32, whatever the model computes in."""
    # Rounding here moves tokens between experts.
    wide = wide_dtype(x_TD.dtype)
    x_TD = x_TD.astype(wide)
    gate_DE = gate_DE.astype(wide)
    return jnp.einsum("TD,DE->TE", x_TD, gate_DE, precision=jax.lax.Precision.HIGHEST)


def uniform(rng: jax.Array, tokens: Tokens, num: int, dtype: Any) -> jax.Array:
    """Returns uniform numbers in [0, 1) of shape [T, num].

    They depend on the row and the place in it, so they are the same on every mesh.
    """
    return _draw(jax.random.uniform, rng, tokens, num, dtype)


def normal(rng: jax.Array, tokens: Tokens, num: int, dtype: Any) -> jax.Array:
    """Returns standard normal numbers [T, num], the same on every mesh as those of `uniform`."""
    return _draw(jax.random.normal, rng, tokens, num, dtype)


def _draw(
    sample: Callable[..., jax.Array], rng: jax.Array, tokens: Tokens, num: int, dtype: Any
) -> jax.Array:
    row_length = tokens.row_T.shape[0] // tokens.num_rows

    def draw(row: jax.Array) -> jax.Array:
        return sample(jax.random.fold_in(rng, row), (row_length, num), dtype)

    # All tokens of a row carry its number: that of the first one is enough.
    first_of_row_b = tokens.row_T[::row_length]
    return jax.vmap(draw)(first_of_row_b).reshape(-1, num)


def token_choice(
    expert_index_TK: jax.Array,
    gate_TK: jax.Array,
    sums: Arrays,
    tokens: Tokens,
    num_experts: int,
    real_TK: jax.Array | None = None,
) -> Routing:
    """Returns the Routing of K choices per token, in the order of the tokens.

    Padding, classes from E on and choices that are not in `real_TK` go nowhere; their gate is 0.
    """
    num_tokens, k = expert_index_TK.shape
    # Classes from E on are null experts, or choices that a router did not make.
    goes_TK = tokens.valid_T[:, None] & (expert_index_TK < num_experts)
    if real_TK is not None:
        goes_TK = goes_TK & real_TK
    expert_index_TK = jnp.where(goes_TK, expert_index_TK, num_experts)
    gate_TK = jnp.where(goes_TK, gate_TK, 0)
    return Routing(
        # 0, 0, .. (k times), 1, 1, ..: this is what `per_token` promises to a dispatcher.
        token_N=jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), k),
        expert_index_N=expert_index_TK.reshape(-1).astype(jnp.int32),
        gate_N=gate_TK.reshape(-1),
        sums=sums,
        per_token=k,
    )
