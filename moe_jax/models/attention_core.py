"""Attention on the rows and heads of one device: causal, bidirectional, with a bidirectional
prefix, or across rows.

The keys that a query may see are one run, `Keys`: in causal attention from the first token of its
segment to itself. So a mask is two comparisons of a key's index with two numbers per query, which a
CPU's compiler vectorises; comparing segments with each other made the exponentials ten times
slower, measured.

Only the log of the softmax's denominator is kept for the backward pass, which computes the scores
again (Dao et al. 2022, FlashAttention, arXiv:2205.14135, algorithm 4). Two kernels do so.
"blocks" (attention_blocks.py) is the CPU's: it runs over groups of heads whose scores stay in the
cache. "chunks" (attention_chunks.py) has the scores of some queries and some keys at a time, so
that memory is linear in S: it is that of all other platforms, and of a CPU where rows are long.
Both can add a bias by the distance of two tokens (attention_bias.py).

B rows, T queries and S keys of a row, H query heads, G key and value heads, r = H / G query heads
per key head, A head width, N = B * G, Q = T * r queries of a key head (query i belongs to token i
// r), K keys of a block, L buckets of a bias.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models import (
    attention_bias,
    attention_blocks,
    attention_chunks,
    attention_splash,
    attention_triton,
)
from moe_jax.models.attention_bias import Buckets
from moe_jax.models.attention_layout import MASKED, SAVED, Reach, Scores
from moe_jax.models.attention_parts import part_that_fits
from moe_jax.parallel import context
from moe_jax.parallel.compiling import by_platform, platform
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype

BY_PLATFORM = "auto"
KERNELS = {"blocks": attention_blocks, "chunks": attention_chunks}
# Those of JAX, for TPUs and for GPUs, which cannot say all that Keys can.
OF_JAX = {"splash": attention_splash, "triton": attention_triton}
# Head widths up to which a CPU sums products of a query and its keys without a matrix product.
MOST_TERMS = 256
# Tokens of a row from which on a CPU takes "chunks".
LONG = 4096


class Keys(NamedTuple):
    """The keys that each query sees: all from `first` to `last`; none where first > last."""

    first_BT: Array
    # () = the query's own place and nothing after it: queries and keys are the same tokens.
    last_BT: Any = ()
    # Where last_BT is (): a number that bounds how many keys any query sees, for blocks to skip the
    # others; None = the whole row.
    window: int | None = None
    # The segments, where they say all that last_BT and window do not; () = they do not.
    segment_BT: Any = ()
    # What is known of them before they are compiled, where the queries are those of one device of
    # the axis `seq`; None = queries and keys are of the same tokens.
    reach: Reach | None = None


def causal(segment_BS: Array) -> Keys:
    """Every token sees itself and earlier tokens of its segment.

    Segments are runs of equal ids; 0 is padding.
    """
    return Keys(_first_of_run(segment_BS), segment_BT=segment_BS)


def windowed(segment_BS: Array, window: int) -> Keys:
    """Every token sees itself and the window - 1 tokens before it, within its segment."""
    S = segment_BS.shape[1]
    # A longer window sees no more, and may be no int32.
    window = min(window, S)
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    first_BS = jnp.maximum(_first_of_run(segment_BS), index_1S - (window - 1))
    return Keys(first_BS, window=window, segment_BT=segment_BS)


def full(segment_BS: Array) -> Keys:
    """Every token sees its whole segment."""
    return Keys(_first_of_run(segment_BS), _last_of_run(segment_BS), segment_BT=segment_BS)


def prefix(segment_BS: Array, prefix_BS: Array) -> Keys:
    """Tokens where `prefix_BS` see the whole prefix of their segment, a run at its beginning;
    others are causal.
    """
    index_1S = jnp.arange(segment_BS.shape[1], dtype=jnp.int32)[None]
    # The rest of every segment is one run of its own, which no segment is called.
    run_BS = jnp.where(prefix_BS, segment_BS, -1)
    last_BS = jnp.where(prefix_BS, _last_of_run(run_BS), index_1S)
    return Keys(_first_of_run(segment_BS), last_BS)


def across(segment_BT: Array, source_segment_BS: Array) -> Keys:
    """Every token that is not padding sees all tokens of the source row that are not: one run, else
    what lies between.
    """
    valid_BS = source_segment_BS > 0
    S = source_segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    # The first and the last token of the source row that are not padding.
    first_B1 = jnp.where(valid_BS, index_1S, S).min(1, keepdims=True)
    last_B1 = jnp.where(valid_BS, index_1S, -1).max(1, keepdims=True)
    # Padding begins behind the last key.
    first_BT = jnp.where(segment_BT > 0, first_B1, S)
    last_BT = jnp.broadcast_to(last_B1, first_BT.shape)
    return Keys(first_BT, last_BT)


def of_own(keys: Keys) -> Keys:
    """Returns the keys that the queries of this device of `seq` see, of those of whole rows.

    Keys are numbered in whole rows as they were.
    """
    last_BS, causal = keys.last_BT, isinstance(keys.last_BT, tuple)
    if causal:
        index_1S = jnp.arange(keys.first_BT.shape[1], dtype=keys.first_BT.dtype)[None]
        last_BS = jnp.broadcast_to(index_1S, keys.first_BT.shape)
    reach = Reach(causal, keys.window, lax.axis_size(context.AXIS))
    return Keys(context.own(keys.first_BT), context.own(last_BS), reach=reach)


def attention(
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    keys: Keys,
    *,
    scale: float,
    cap: float = 0.0,
    buckets: Buckets | None = None,
    bias_LH: Array | None = None,
    sink_H: Array | None = None,
    kernel: str = BY_PLATFORM,
) -> Array:
    """Returns o_BTHA: every query attends to its run of keys; softmax in float32 or wider.

    One that sees none gives zero. `bias_LH`: what is added to the scores of each head by `buckets`
    of distances, where queries and keys are the same tokens. `sink_H`: scores that stand in the
    softmax of each head beside the others, without a value. Values may have another width than
    keys.

    H is a multiple of G; query heads [i * r, (i + 1) * r) share key head i. `kernel` is one of
    KERNELS, or BY_PLATFORM: that of the platform compiled for; or one of OF_JAX, where it can say
    which keys are seen.
    """
    scores = Scores(scale, cap, buckets)
    reach = keys.reach or Reach(isinstance(keys.last_BT, tuple), keys.window)
    if kernel in OF_JAX:
        own = OF_JAX[kernel]
        is_plain = sink_H is None and bias_LH is None and v_BSGA.shape == k_BSGA.shape
        if is_plain and own.can_say(q_BTHA, keys.segment_BT, scores, reach):
            return own.attention(q_BTHA, k_BSGA, v_BSGA, keys.segment_BT, scores, reach)
        kernel = BY_PLATFORM
    B, T, H, _ = q_BTHA.shape
    # One array in causal attention, where last_BT is (), else two.
    bounds = tuple(jax.tree.leaves((keys.first_BT, keys.last_BT)))
    bias_BHL: Any = ()
    if bias_LH is not None:
        # As many as rows, because a CPU works on some rows and heads at a time.
        bias_BHL = jnp.broadcast_to(bias_LH.T[None], (B, *bias_LH.T.shape))
    arrays, structure = jax.tree.flatten((q_BTHA, k_BSGA, v_BSGA, bounds, bias_BHL))
    inputs = jax.tree.unflatten(structure, vary_alike(*arrays))
    how = _How(scores, reach, kernel)
    if sink_H is None:
        return _core(how, *inputs)
    o_BTHA, log_sum_BGQ = _core_and_sum(how, *inputs)
    # With a sink z the denominator is exp(log_sum) + exp(z): of the output without it is left
    # exp(log_sum) / (exp(log_sum) + exp(z)) = sigmoid(log_sum - z).
    log_sum_BGTr = log_sum_BGQ.reshape(B, k_BSGA.shape[2], T, -1)
    log_sum_BTH = jnp.swapaxes(log_sum_BGTr, 1, 2).reshape(B, T, H)
    kept_BTH = jax.nn.sigmoid(log_sum_BTH - sink_H.astype(log_sum_BTH.dtype)[None, None])
    kept_BTHA = o_BTHA.astype(kept_BTH.dtype) * kept_BTH[..., None]
    return kept_BTHA.astype(q_BTHA.dtype)


def decode_attention(
    q_BqHA: Array,
    k_BGAS: Array,
    v_BGSA: Array,
    mask_BqS: Array,
    *,
    scale: float,
    cap: float = 0.0,
    buckets: Buckets | None = None,
    bias_LH: Array | None = None,
    position_Bq: Array | None = None,
    sink_H: Array | None = None,
) -> Array:
    """Returns o_BqHA of a few queries against a cache of keys and values, where `mask_BqS` says
    which a query may see.

    A query that may see nothing gives zero. `buckets` and `bias_LH` as in `attention`, of queries
    at `position_Bq`.
    """
    B, q, H, A = q_BqHA.shape
    wide = wide_dtype(q_BqHA.dtype)
    G, S = v_BGSA.shape[1:3]
    r = H // G
    # The r query heads that share a key head stand side by side.
    q_BGrqA = jnp.moveaxis(q_BqHA.reshape(B, q, G, r, A), 1, 3)
    product_NQS = _of_slots(q_BGrqA.reshape(B * G, r * q, A), k_BGAS.reshape(B * G, A, S), wide)
    score_BGrqS = product_NQS.reshape(B, G, r, q, S)
    seen_BGrqS = mask_BqS[:, None, None]
    score_BGrqS = Scores(scale, cap).of(score_BGrqS)
    if buckets is not None and bias_LH is not None and position_Bq is not None:
        added_BHqS = attention_bias.of_slots(bias_LH, buckets, position_Bq, S)
        score_BGrqS = score_BGrqS + added_BHqS.reshape(score_BGrqS.shape)
    score_BGrqS = jnp.where(seen_BGrqS, score_BGrqS, MASKED)
    if sink_H is None:
        weight_BGrqS = jax.nn.softmax(score_BGrqS)
    else:
        # One more key, which every query sees and which has no value.
        sink_Gr = sink_H.astype(wide).reshape(score_BGrqS.shape[1:3])
        sink_BGrq1 = jnp.broadcast_to(sink_Gr[None, :, :, None, None], (*score_BGrqS.shape[:-1], 1))
        both = jnp.concatenate([score_BGrqS, sink_BGrq1], axis=-1)
        weight_BGrqS = jax.nn.softmax(both)[..., :-1]
    # A softmax over nothing but MASKED is even; what is not seen gets no weight.
    weight_BGrqS = jnp.where(seen_BGrqS, weight_BGrqS, 0).astype(v_BGSA.dtype)
    o_BGrqA = jnp.einsum("BGrqS,BGSA->BGrqA", weight_BGrqS, v_BGSA, preferred_element_type=wide)
    # Turned behind the product: an einsum to this order transposes all values first.
    o_BqGrA = jnp.moveaxis(o_BGrqA, 3, 1)
    return o_BqGrA.reshape(B, q, H, -1).astype(q_BqHA.dtype)


def _of_slots(q_NQA: Array, k_NAS: Array, wide: Any) -> Array:
    """Returns the products of Q queries and the keys of all slots [N, Q, S], in `wide` numbers."""
    num_queries, width = q_NQA.shape[1:]
    if platform() != "cpu" or num_queries > 1 or width > MOST_TERMS:
        return jnp.einsum("NQA,NAS->NQS", q_NQA, k_NAS, preferred_element_type=wide)
    # With one query a product reads each key once, and XLA's own does so at half the speed of
    # memory. Written as a sum it is one loop over slots, of vectors.
    sums = [q_NQA[:, 0, a, None].astype(wide) * k_NAS[:, a].astype(wide) for a in range(width)]
    # Eight at a time: one long sum would wait for each addition before the next.
    while len(sums) > 1:
        groups = [sums[first : first + 8] for first in range(0, len(sums), 8)]
        sums = [functools.reduce(jnp.add, group) for group in groups]
    return sums[0][:, None]


def _first_of_run(segment_BS: Array) -> Array:
    """Returns the index of the first token of each token's segment; S, which no key has, for
    padding.
    """
    S = segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    # The first token of a row is compared with its last one: its index is 0 in either case.
    changes_BS = segment_BS != jnp.roll(segment_BS, 1, axis=1)
    begin_BS = jnp.where(changes_BS, index_1S, 0)
    first_BS = lax.cummax(begin_BS, axis=1)
    return jnp.where(segment_BS > 0, first_BS, S)


def _last_of_run(segment_BS: Array) -> Array:
    """Returns the index of the last token of each token's segment."""
    S = segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    changes_BS = segment_BS != jnp.roll(segment_BS, -1, axis=1)
    end_BS = jnp.where(changes_BS, index_1S, S - 1)
    return lax.cummin(end_BS, axis=1, reverse=True)


class _How(NamedTuple):
    """Holds what is known of attention before it is compiled."""

    scores: Scores
    reach: Reach
    kernel: str


# The core and its gradient. `bounds` is (first_BT,) in causal attention, else (first_BT, last_BT);
# `bias_BHL` is () without a bias.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    how: _How,
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    bounds: tuple[Array, ...],
    bias_BHL: Any,
) -> Array:
    return _forward(how, q_BTHA, k_BSGA, v_BSGA, bounds, bias_BHL)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core_and_sum(how: _How, *inputs: Any) -> tuple[Array, Array]:
    """Returns (o_BTHA, log_sum_BGQ), where the log of the denominator has a gradient too."""
    return _forward_and_sum(how, *inputs)[0]


def _forward(how: _How, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    results = _by_platform("forward", how, inputs[0], *inputs)
    # Both: without the sums a backward pass that has the output computes attention again.
    o_BTHA, log_sum_BGQ = (checkpoint_name(z, SAVED) for z in results)
    return o_BTHA, (*inputs, o_BTHA, log_sum_BGQ)


def _forward_and_sum(how: _How, *inputs: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    o_BTHA, residue = _forward(how, *inputs)
    return (o_BTHA, residue[-1]), residue


def _backward(how: _How, residue: tuple[Any, ...], do_BTHA: Array) -> tuple[Any, ...]:
    return _backward_and_sum(how, residue, (do_BTHA, None))


def _backward_and_sum(how: _How, residue: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
    do_BTHA, dlog_sum_BGQ = cotangents
    *gradients, dbias_BHL = _by_platform("backward", how, do_BTHA, *residue, do_BTHA, dlog_sum_BGQ)
    # Bounds are indices, which have no gradient.
    return *gradients, None, dbias_BHL


_core.defvjp(_forward, _backward)
_core_and_sum.defvjp(_forward_and_sum, _backward_and_sum)


def _by_platform(part: str, how: _How, near: Array, *args: Any) -> Any:
    """Runs the "forward" or "backward" part of the kernel that is chosen.

    `near` is an array that no other call has (parallel/zeros.py).
    """
    q_BTHA, k_BSGA, _, bounds, *_ = args
    B, T, H, _ = q_BTHA.shape
    S, G = k_BSGA.shape[1:3]
    # The scores of a long row do not fit into the cache, nor their square into memory.
    is_long = max(T, S) >= LONG
    name = how.kernel
    if name == BY_PLATFORM:
        # Of a row that is split only chunks know which keys no query of a device sees.
        name = "chunks" if is_long or how.reach.shards > 1 else "blocks"

    def bound(name: str, size: int) -> Any:
        return functools.partial(getattr(KERNELS[name], part), how.scores, how.reach, size)

    def in_parts(*args: Any) -> Any:
        # A CPU: as many rows and heads at a time as have their scores in its cache.
        size, scores = _sizes(name, T, S, H // G, causal=len(bounds) == 1)
        run = bound(name, size)
        some = part_that_fits(B, G, scores)
        if some.rows == B and some.heads == G:
            return run(*args)
        return some.run_all(run, near, args)

    def at_once(*args: Any) -> Any:
        # One block of all queries, where a user asks for it; else the chunks of accelerators.
        if how.kernel == "blocks":
            return bound("blocks", 1)(*args)
        return bound("chunks", attention_chunks.chunk_tokens(B * H))(*args)

    return by_platform(*args, cpu=in_parts, others=at_once)


def _sizes(name: str, T: int, S: int, r: int, causal: bool) -> tuple[int, int]:
    """Returns (what a kernel on a CPU is told: how many blocks, or the tokens of a chunk; how many
    scores of a key head exist at once).
    """
    if name == "chunks":
        tokens = attention_chunks.CHUNK_ON_CPU
        return tokens, min(T, tokens) * r * min(S, tokens)
    length = S if causal else T
    # Blocks are a part of the program: many take long to compile.
    num_blocks = 8 if length >= 1024 else max(1, min(4, length // 64))
    return num_blocks, T * r * S
