"""Mixture of depths: a whole block that only some tokens of a row go through (Raposo et al. 2024,
arXiv:2404.02258).

A linear router gives every token a scalar r_i = w . x_i (section 3.4), in at least float32. The
tokens that are chosen go through the block, and attend only to each other; the others skip it (eq.
1):

    x_i + r_i f_i(chosen x)   if i is chosen,      x_i   if not,

where f is all that the block would add to the residual stream. The factor r_i is how the loss
reaches the router.

Training chooses the `capacity` S largest r_i of each row, padding apart ("expert choice", section
3.3): a fixed number, so the block costs that fraction. Whether a token is among them depends on
later tokens, so a causal language model that trains so has a leak, and config asks for
`model.allow_leak`. Nothing can be decoded by that rule. Evaluation and generation therefore
*always* use the causal rule of section 3.5: token i is chosen if sigmoid(r_i) > 1/2, so bits per
byte are those of a model that can be decoded. The rule is trained by a binary cross-entropy whose
logits are the r_i and whose targets say which tokens were among the largest; its gradient reaches w
and not x. The causal rule chooses any number of tokens: all S places are computed, and those that
no token needs are padding.

Statistics leave as sums per row, named "depth/...", beside those of the MoE layers: one entry per
depth block.

Shapes: B rows, S sequence, C places in the block (S or fewer), D model, M length of the cache, L
depth blocks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.models.layers import gather
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.precision import wide_dtype
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight

# What the names of the sums begin with.
NAME = "depth/"

Sums = dict[str, Array]
# What a block adds to the tokens [B, C, D] that go through it, and what is beside that.
Update = Callable[..., tuple[Array, Any]]


class DepthCache(NamedTuple):
    """The cache of a depth block's attention, slot by position, and which positions hold a token
    that went through it.
    """

    attention: Any
    chosen_BM: Any

    @property
    def num_slots(self) -> int:
        return self.attention.num_slots


def empty_cache(attention: Any, num_rows: int, num_slots: int) -> DepthCache:
    """Returns the cache of a block that no token went through."""
    chosen_BM = jnp.zeros((num_rows, num_slots), bool)
    return DepthCache(attention, jax.sharding.reshard(chosen_BM, P(BATCH, None)))


def declare(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the weights of the router: a direction, along which a token is scored."""
    return {"router": Weight((cfg.d_model,), ("embed",), cfg.d_model**-0.5)}


def num_chosen(capacity: float, seq_len: int) -> int:
    """Returns the tokens of a row that go through a block in training, C = ceil(capacity S).

    Rounding errors of the product do not add one.
    """
    return max(1, math.ceil(capacity * seq_len - 1e-9))


def choose(logit_BS: Array, valid_BS: Array, num: int) -> Array:
    """Returns chosen_BS: the `num` valid tokens of each row with the largest logits, all if they
    are fewer; of equals the first.
    """
    S = logit_BS.shape[1]
    score_BS = jnp.where(valid_BS, logit_BS, -jnp.inf)
    _, index_BC = jax.lax.top_k(score_BS, num)

    def mark(index_C):
        return jnp.zeros(S, bool).at[index_C].set(True)

    # Rows with fewer valid tokens than places have marked padding, too.
    return jax.vmap(mark)(index_BC) & valid_BS


def through(
    update: Update,
    router_D: Array,
    x_BSD: Array,
    batch: Batch,
    train: bool,
    cfg: ModelConfig,
) -> tuple[Array, Sums]:
    """Returns (x_BSD after the block, sums of the block and of its depth router).

    `update(x_BCD, batch) -> (y_BCD, sums)`. The chosen tokens stand first, in order, as rows of C
    places with their own ids, positions and segments; what is left is segment 0.
    """
    S = x_BSD.shape[1]
    logit_BS, chosen_BS, sums = _route(router_D, x_BSD, batch.segment_BS > 0, train, cfg)
    num = num_chosen(cfg.depth.capacity, S) if train else S

    def places(chosen_S):
        # S, which no token has, fills the places that are left.
        return jnp.nonzero(chosen_S, size=num, fill_value=S)[0]

    def take(z_S, place_C):
        return z_S.at[place_C].get(mode="fill", fill_value=0)

    def add(x_SD, place_C, y_CD):
        return x_SD.at[place_C].add(y_CD, mode="drop")

    with jax.named_scope("depth"):
        place_BC = jax.vmap(places)(chosen_BS)
        take_rows = jax.vmap(take)

        def chosen(z):
            # What is of a row, and not of a token, stays.
            return take_rows(z, place_BC) if z.ndim > 1 else z

        batch = jax.tree.map(chosen, batch)
        h_BCD, gate_BC = chosen(x_BSD), chosen(logit_BS)
    y_BCD, block_sums = update(h_BCD, batch)
    with jax.named_scope("depth"):
        # The factor r_i is how the loss reaches the router.
        gated_BCD = y_BCD * gate_BC[:, :, None].astype(y_BCD.dtype)
        x_BSD = jax.vmap(add)(x_BSD, place_BC, gated_BCD)
    return x_BSD, {**block_sums, **sums}


def cached(
    update: Update,
    router_D: Array,
    x_BSD: Array,
    batch: Batch,
    cache: DepthCache,
    cfg: ModelConfig,
) -> tuple[Array, DepthCache]:
    """Applies the causal rule with a cache: tokens that are not chosen are padding to the block,
    and no key that a later one may see.

    `update(x_BSD, batch, cache of its attention, chosen_BM) -> (y_BSD, cache)`.
    """
    logit_BS, chosen_BS, _ = _route(router_D, x_BSD, batch.segment_BS > 0, False, cfg)

    def write(old_M, position_S, new_S):
        return old_M.at[position_S].set(new_S, mode="drop")

    # The slots remember it: later tokens must not see the key of one that was not chosen.
    chosen_BM = jax.vmap(write)(cache.chosen_BM, batch.position_BS, chosen_BS)
    through = batch._replace(segment_BS=jnp.where(chosen_BS, batch.segment_BS, 0))
    y_BSD, attention = update(x_BSD, through, cache.attention, chosen_BM)
    # All places are computed; those that were not chosen add nothing.
    gate_BS = jnp.where(chosen_BS, logit_BS, 0)
    gated_BSD = y_BSD * gate_BS[:, :, None].astype(y_BSD.dtype)
    return x_BSD + gated_BSD, DepthCache(attention, chosen_BM)


def _route(
    router_D: Array, x_BSD: Array, valid_BS: Array, train: bool, cfg: ModelConfig
) -> tuple[Array, Array, Sums]:
    """Returns (logit_BS, chosen_BS by the rule of training or the causal one, sums per row)."""
    with jax.named_scope("depth"):
        wide = wide_dtype(x_BSD.dtype)
        w_D = gather(router_D, ("embed",), wide)

        def scores(x_BSD):
            return jnp.einsum("BSD,D->BS", x_BSD.astype(wide), w_D)

        def per_row(z_BS):
            return jnp.where(valid_BS, z_BS.astype(wide), 0).sum(1)

        logit_BS = scores(x_BSD)
        num = num_chosen(cfg.depth.capacity, x_BSD.shape[1])
        top_BS = choose(jax.lax.stop_gradient(logit_BS), valid_BS, num)
        # sigmoid(r) > 1/2
        causal_BS = (logit_BS > 0) & valid_BS
        # The gradient of the cross-entropy reaches the router alone. Of a logit r with the target t
        # it is softplus(r) - t r.
        aux_BS = scores(jax.lax.stop_gradient(x_BSD))
        bce_B = per_row(jax.nn.softplus(aux_BS) - jnp.where(top_BS, aux_BS, 0))
        sums = {
            "tokens": per_row(valid_BS),
            "top": per_row(top_BS),
            "causal": per_row(causal_BS),
            "agree": per_row(top_BS == causal_BS),
            "bce": bce_B,
            "penalty": cfg.depth.loss * bce_B,
        }
        named = {NAME + name: z for name, z in sums.items()}
        return logit_BS, top_BS if train else causal_BS, named


# What becomes of the sums.


def totals(sums_LB: Mapping[str, Array]) -> Sums:
    """Returns sums over the rows of the batch, [L] each; none for a model without depth blocks."""
    # The sums of all layers are in one dict, those of the MoE layers among them.
    mine = {name: x for name, x in sums_LB.items() if name.startswith(NAME)}
    return {name.removeprefix(NAME): x.sum(1) for name, x in mine.items()}


def without(sums_LB: Mapping[str, Array]) -> Sums:
    """Returns the sums of the MoE layers alone."""
    return {name: x for name, x in sums_LB.items() if not name.startswith(NAME)}


def penalty(totals: Mapping[str, Array]) -> Array:
    """Returns what the objective adds: model.depth.loss times the cross-entropy of the causal rule,
    mean over tokens, then over blocks.
    """
    per_token_L = totals["penalty"] / jnp.maximum(totals["tokens"], 1)
    return per_token_L.mean()


def figures(totals: Mapping[str, Any]) -> dict[str, Any]:
    """Returns means over depth blocks: {} without any.

    depth_loss: cross-entropy of the causal rule, nats per token (log 2 = it knows nothing);
    depth_top and depth_causal: fraction of the tokens that each rule lets through the block;
    depth_agreement: fraction of the tokens that both rules treat alike.
    """
    if not totals:
        return {}

    def mean(name):
        return (totals[name] / totals["tokens"].clip(1)).mean()

    names = {"loss": "bce", "top": "top", "causal": "causal", "agreement": "agree"}
    return {f"depth_{name}": mean(key) for name, key in names.items()}
