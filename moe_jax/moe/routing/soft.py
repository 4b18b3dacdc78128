"""Soft MoE (Puigcerver et al. 2023, arXiv:2308.00951, section 2.1, eq. 1-2): experts work on
mixtures of tokens, nothing is assigned.

    l_tes = x_t . phi_es                         p slots of each of E experts, for each group of
                                                 tokens
    D = softmax over the tokens of l   (eq. 1)   slot s of expert e takes sum over t of D_tes x_t
    C = softmax over all slots of l    (eq. 2)   token t gets sum over e, s of C_tes times what
                                                 expert e makes of slot s
    normalize: x_t / |x_t| and scale * phi_es / |phi_es| in l alone, with a learned scale (section
        2.3); without, l grows with D model

Padding is in no slot and gets nothing. Every slot mixes all tokens of its group: a causal model
leaks, and cannot be decoded. Goes with the dispatcher "slots" alone. Statistics: counts and
importance of an expert are the sum of C over its slots, for every token uses every expert; gates
sum to 1. Shapes: G groups, t tokens of a group, p slots of an expert.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Sees,
    Sizes,
    Slots,
    Tokens,
)
from moe_jax.moe.routing.statistics import class_statistics
from moe_jax.precision import wide_dtype
from moe_jax.schema.options import NUMBER, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    slots: int = option(
        4,
        "of each expert in each group; about tokens of a group / num_experts costs what k = 1 does",
        NUMBER,
    )
    normalize: bool = option(True, "unit vectors and a learned scale in the slots' scores")


def params(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares phi [D, E, p], and the scale of its normalised columns."""
    shape = (sizes.d_model, sizes.num_experts, options.slots)
    weights = {"phi": Weight(shape, ("embed", None, None), sizes.d_model**-0.5)}
    if options.normalize:
        weights["scale"] = Weight((), (), 0.0, 1.0)
    return weights


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Slots:
    """Returns the mixtures of each group."""
    del state, rng, train
    slot_logits_TEp = slot_logits(tokens.x_TD, params, cfg.options.normalize)
    num_groups = tokens.num_rows // cfg.group_rows

    def by_group(z: jax.Array) -> jax.Array:
        return z.reshape((num_groups, -1) + z.shape[1:])

    valid_T11 = tokens.valid_T[:, None, None]
    # Equation 1: a softmax over the tokens of a group.
    dispatch_GtEp = jax.nn.softmax(by_group(slot_logits_TEp), 1, where=by_group(valid_T11))
    # Equation 2: a softmax over all slots.
    combine_TEp = jnp.where(valid_T11, jax.nn.softmax(slot_logits_TEp, (1, 2)), 0)

    # A softmax over the experts of these logits is the sum of C over the slots of an expert, and
    # their log-sum-exp is that over all slots: so the statistics are those of any router.
    router_logits_TE = jax.nn.logsumexp(slot_logits_TEp, 2)
    share_TE = combine_TEp.sum(2)
    sums = class_statistics(
        router_logits_TE,
        share_TE,
        share_TE,
        tokens,
        # Nothing is chosen, so no expert comes first: the shares stand for the first choices too.
        first_TC=jax.lax.stop_gradient(share_TE),
    )
    return Slots(dispatch_GtEp, by_group(combine_TEp), sums)


def slot_logits(x_TD: jax.Array, params: Arrays, normalize: bool) -> jax.Array:
    """Returns l [T, E, p] in at least float32."""
    wide = wide_dtype(x_TD.dtype)
    x_TD = x_TD.astype(wide)
    phi_DEp = params["phi"].astype(wide)
    if normalize:
        x_TD = unit_length(x_TD, 1)
        phi_DEp = params["scale"].astype(wide) * unit_length(phi_DEp, 0)
    return jnp.einsum("TD,DEp->TEp", x_TD, phi_DEp, precision=jax.lax.Precision.HIGHEST)


def unit_length(x: jax.Array, axis: int) -> jax.Array:
    """Returns x / |x| along an axis; 0 where x is 0, as padding may be."""
    # The paper adds 1e-6 to the root. Inside of it the bound has a gradient at 0.
    square_length = jnp.square(x).sum(axis, keepdims=True)
    return x * jax.lax.rsqrt(square_length + 1e-12)


def sees(options: Options) -> Sees:
    del options
    return Sees(future=True, batch=False)


def declared(num_experts: int, options: Options) -> Declared:
    """Returns its promises: every token reads every expert."""
    # An expert computes p rows for each group, whatever its tokens (plan/flops).
    del options
    return Declared(most=num_experts, exact=False, gate_sum=1.0)


def balanced_by(options: Options) -> str:
    """Names the slots."""
    del options
    return "its slots"


def num_slots(options: Options) -> int:
    """Returns p, the slots of an expert in a group."""
    return options.slots


def multiplied(options: Options, n: int) -> Options:
    """Returns the same options: a token reads all experts, however many there are."""
    del n
    return options


ROUTER = Router(
    Options,
    route,
    sees,
    declared,
    params=params,
    balanced_by=balanced_by,
    num_slots=num_slots,
    multiplied=multiplied,
)
