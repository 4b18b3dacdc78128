"""Attention on the rows and heads of one device: causal, bidirectional, with a bidirectional
prefix, or across rows.

The keys that a query may see are one run, `Keys`: in causal attention from the first token of its
segment to itself. So a mask is two comparisons of a key's index with two numbers per query, which a
CPU's compiler vectorises; comparing segments with each other made the exponentials ten times
slower, measured.

The CPU runs over a few static blocks of queries, each with only the keys that causality and a
window allow where they are known, and over groups of heads whose scores stay in the cache. Only the
log of the softmax's denominator is kept for the backward pass, which computes the scores again (Dao
et al. 2022, FlashAttention, arXiv:2205.14135, algorithm 4). Other platforms run the same code as
one block and one group, which is plain XLA.

B rows, T queries and S keys of a row, H query heads, G key and value heads, r = H / G query heads
per key head, A head width, N = B * G, Q = T * r queries of a key head (query i belongs to token i
// r), K keys of a block.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.models.attention_parts import part_that_fits
from moe_jax.parallel.compiling import by_platform
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype

# A score, far below every real one and far from overflow.
MASKED = -1e30


class Keys(NamedTuple):
    """The keys that each query sees: all from `first` to `last`; none where first > last."""

    first_BT: Array
    # () = the query's own place and nothing after it: queries and keys are the same tokens.
    last_BT: Any = ()
    # Where last_BT is (): a number that bounds how many keys any query sees, for blocks to skip the
    # others; None = the whole row.
    window: int | None = None


class Scores(NamedTuple):
    """What becomes of the product of a query and a key: times `scale`, then cap * tanh(s / cap)
    (Gemma 2, arXiv:2408.00118, section 2); cap = 0: no cap.
    """

    scale: float
    cap: float = 0.0

    def of(self, product: Array) -> Array:
        score = product * self.scale
        return self.cap * jnp.tanh(score / self.cap) if self.cap else score

    def pulled(self, dscore: Array, score: Array) -> Array:
        """Returns the gradient of the product times scale, from that of the score."""
        return dscore * (1 - jnp.square(score / self.cap)) if self.cap else dscore


def causal(segment_BS: Array) -> Keys:
    """Every token sees itself and earlier tokens of its segment.

    Segments are runs of equal ids; 0 is padding.
    """
    return Keys(_first_of_run(segment_BS))


def windowed(segment_BS: Array, window: int) -> Keys:
    """Every token sees itself and the window - 1 tokens before it, within its segment."""
    S = segment_BS.shape[1]
    # A longer window sees no more, and may be no int32.
    window = min(window, S)
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    first_BS = jnp.maximum(_first_of_run(segment_BS), index_1S - (window - 1))
    return Keys(first_BS, window=window)


def full(segment_BS: Array) -> Keys:
    """Every token sees its whole segment."""
    return Keys(_first_of_run(segment_BS), _last_of_run(segment_BS))


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
    first_B1 = jnp.where(valid_BS, index_1S, S).min(1, keepdims=True)
    last_B1 = jnp.where(valid_BS, index_1S, -1).max(1, keepdims=True)
    # Padding begins behind the last key.
    first_BT = jnp.where(segment_BT > 0, first_B1, S)
    last_BT = jnp.broadcast_to(last_B1, first_BT.shape)
    return Keys(first_BT, last_BT)


def attention(
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    keys: Keys,
    *,
    scale: float,
    cap: float = 0.0,
    sink_H: Array | None = None,
) -> Array:
    """o_BTHA: every query attends to its run of keys; softmax in float32 or wider.

    One that sees none gives zero. `sink_H`: scores that stand in the softmax of each head beside
    the others, without a value. Values may have another width than keys.

    H is a multiple of G; query heads [i * r, (i + 1) * r) share key head i.
    """
    bounds = jax.tree.leaves((keys.first_BT, keys.last_BT))
    q_BTHA, k_BSGA, v_BSGA, *bounds = vary_alike(q_BTHA, k_BSGA, v_BSGA, *bounds)
    scores, inputs = Scores(scale, cap), (q_BTHA, k_BSGA, v_BSGA, tuple(bounds))
    if sink_H is None:
        return _core(scores, keys.window, *inputs)
    o_BTHA, log_sum_BGQ = _core_and_sum(scores, keys.window, *inputs)
    # With a sink z the denominator is exp(log_sum) + exp(z).
    B, T, H, _ = q_BTHA.shape
    log_sum_BGTr = log_sum_BGQ.reshape(B, k_BSGA.shape[2], T, -1)
    log_sum_BTH = jnp.swapaxes(log_sum_BGTr, 1, 2).reshape(B, T, H)
    kept_BTH = jax.nn.sigmoid(log_sum_BTH - sink_H.astype(log_sum_BTH.dtype)[None, None])
    kept_BTHA = o_BTHA.astype(kept_BTH.dtype) * kept_BTH[..., None]
    return kept_BTHA.astype(q_BTHA.dtype)


def decode_attention(
    q_BqHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    mask_BqS: Array,
    *,
    scale: float,
    cap: float = 0.0,
    sink_H: Array | None = None,
) -> Array:
    """o_BqHA of a few queries against a cache of keys and values, where `mask_BqS` says which a
    query may see.

    A query that may see nothing gives zero.
    """
    B, q, H, A = q_BqHA.shape
    wide = wide_dtype(q_BqHA.dtype)
    q_BqGrA = q_BqHA.reshape(B, q, k_BSGA.shape[2], -1, A)
    score_BGrqS = jnp.einsum("BqGrA,BSGA->BGrqS", q_BqGrA, k_BSGA, preferred_element_type=wide)
    seen_BGrqS = mask_BqS[:, None, None]
    score_BGrqS = jnp.where(seen_BGrqS, Scores(scale, cap).of(score_BGrqS), MASKED)
    if sink_H is None:
        weight_BGrqS = jax.nn.softmax(score_BGrqS)
    else:
        sink_Gr = sink_H.astype(wide).reshape(score_BGrqS.shape[1:3])
        sink_BGrq1 = jnp.broadcast_to(sink_Gr[None, :, :, None, None], (*score_BGrqS.shape[:-1], 1))
        both = jnp.concatenate([score_BGrqS, sink_BGrq1], axis=-1)
        weight_BGrqS = jax.nn.softmax(both)[..., :-1]
    # A softmax over nothing but MASKED is even; what is not seen gets no weight.
    weight_BGrqS = jnp.where(seen_BGrqS, weight_BGrqS, 0).astype(v_BSGA.dtype)
    o_BqGrA = jnp.einsum("BGrqS,BSGA->BqGrA", weight_BGrqS, v_BSGA, preferred_element_type=wide)
    return o_BqGrA.reshape(B, q, H, -1).astype(q_BqHA.dtype)


def _first_of_run(segment_BS: Array) -> Array:
    """Index of the first token of each token's segment; S, which no key has, for padding."""
    S = segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    # The first token of a row is compared with its last one: its index is 0 in either case.
    changes_BS = segment_BS != jnp.roll(segment_BS, 1, axis=1)
    begin_BS = jnp.where(changes_BS, index_1S, 0)
    first_BS = lax.cummax(begin_BS, axis=1)
    return jnp.where(segment_BS > 0, first_BS, S)


def _last_of_run(segment_BS: Array) -> Array:
    """Index of the last token of each token's segment."""
    S = segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    changes_BS = segment_BS != jnp.roll(segment_BS, -1, axis=1)
    end_BS = jnp.where(changes_BS, index_1S, S - 1)
    return lax.cummin(end_BS, axis=1, reverse=True)


# The core and its gradient. `bounds` is (first_BT,) in causal attention, else (first_BT, last_BT).


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core(
    scores: Scores,
    window: int | None,
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    bounds: tuple[Array, ...],
) -> Array:
    return _forward(scores, window, q_BTHA, k_BSGA, v_BSGA, bounds)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core_and_sum(scores: Scores, window: int | None, *inputs: Any) -> tuple[Array, Array]:
    """(o_BTHA, log_sum_BGQ), where the log of the denominator has a gradient too."""
    return _forward_and_sum(scores, window, *inputs)[0]


def _forward(scores: Scores, window: int | None, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    run = functools.partial(_forward_heads, scores, window)
    o_BTHA, log_sum_BGQ = _by_platform(run, inputs[0], *inputs)
    return o_BTHA, (*inputs, o_BTHA, log_sum_BGQ)


def _forward_and_sum(
    scores: Scores, window: int | None, *inputs: Any
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    o_BTHA, residue = _forward(scores, window, *inputs)
    return (o_BTHA, residue[-1]), residue


def _backward(
    scores: Scores, window: int | None, residue: tuple[Any, ...], do_BTHA: Array
) -> tuple[Any, ...]:
    return _backward_and_sum(scores, window, residue, (do_BTHA, None))


def _backward_and_sum(
    scores: Scores, window: int | None, residue: tuple[Any, ...], cotangents: Any
) -> tuple[Any, ...]:
    do_BTHA, dlog_sum_BGQ = cotangents
    run = functools.partial(_backward_heads, scores, window)
    gradients = _by_platform(run, do_BTHA, *residue, do_BTHA, dlog_sum_BGQ)
    # Bounds are indices, which have no gradient.
    return *gradients, None


_core.defvjp(_forward, _backward)
_core_and_sum.defvjp(_forward_and_sum, _backward_and_sum)


def _by_platform(run: Any, near: Array, *args: Any) -> Any:
    """Switches by platform, here and nowhere else.

    `run(num_blocks, *args)`, in blocks and for some heads after others where compiled for a CPU,
    else at once. `near` is an array that no other call has (parallel/zeros.py).
    """
    q_BTHA, k_BSGA, _, bounds, *_ = args
    B, T, H, _ = q_BTHA.shape
    S, G = k_BSGA.shape[1:3]
    length = S if len(bounds) == 1 else T
    # Blocks are a part of the program: many take long to compile.
    num_blocks = 8 if length >= 1024 else max(1, min(4, length // 64))
    part = part_that_fits(B, G, scores=T * H // G * S)

    def in_parts(*args):
        if part.rows == B and part.heads == G:
            return run(num_blocks, *args)
        return part.run_all(functools.partial(run, num_blocks), near, args)

    return by_platform(*args, cpu=in_parts, others=functools.partial(run, 1))


def _heads_first(z_BTHA: Array, G: int) -> Array:
    """[N, T * r, A]: the r queries of a token that share a key head stand side by side."""
    B, T, _, A = z_BTHA.shape
    z_BTGrA = z_BTHA.reshape(B, T, G, -1)
    return jnp.swapaxes(z_BTGrA, 1, 2).reshape(B * G, -1, A)


def _heads_last(z_NQA: Array, shape: tuple[int, ...], G: int) -> Array:
    """The array of `shape`, [B, T, H, A], that `_heads_first` came from."""
    B, T, _, _ = shape
    z_BGTrA = z_NQA.reshape(B, G, T, -1)
    return jnp.swapaxes(z_BGTrA, 1, 2).reshape(shape)


def _runs(bounds: tuple[Array, ...], num_heads: int, G: int) -> tuple[Array, ...]:
    """The bounds of each query, [N, Q]: query i belongs to token i // r."""

    def of_queries(z_BT):
        B, T = z_BT.shape
        z_BGTr = jnp.broadcast_to(z_BT[:, None, :, None], (B, G, T, num_heads // G))
        return z_BGTr.reshape(B * G, -1)

    return tuple(of_queries(z_BT) for z_BT in bounds)


def _forward_heads(
    scores: Scores,
    window: int | None,
    num_blocks: int,
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    bounds: tuple[Array, ...],
) -> tuple[Array, Array]:
    """(o_BTHA, log_sum_BGQ)."""
    B, _, H, _ = q_BTHA.shape
    G = k_BSGA.shape[2]
    q, k, v = (_heads_first(z, G) for z in (q_BTHA, k_BSGA, v_BSGA))
    runs = _runs(bounds, H, G)
    o_NQA, log_sum_NQ = _forward_blocks(scores, window, num_blocks, q, k, v, runs)
    o_shape = (*q_BTHA.shape[:3], v_BSGA.shape[3])
    return _heads_last(o_NQA, o_shape, G), log_sum_NQ.reshape(B, G, -1)


def _backward_heads(
    scores: Scores,
    window: int | None,
    num_blocks: int,
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    bounds: tuple[Array, ...],
    o_BTHA: Array,
    log_sum_BGQ: Array,
    do_BTHA: Array,
    dlog_sum_BGQ: Array | None,
) -> tuple[Array, Array, Array]:
    """(dq_BTHA, dk_BSGA, dv_BSGA)."""
    G = k_BSGA.shape[2]
    q, k, v, o, do = (_heads_first(z, G) for z in (q_BTHA, k_BSGA, v_BSGA, o_BTHA, do_BTHA))
    runs = _runs(bounds, q_BTHA.shape[2], G)
    log_sum_NQ = log_sum_BGQ.reshape(q.shape[:2])
    wide = wide_dtype(q.dtype)
    # Of the softmax's gradient: weights times (their gradients less this).
    both_NQA = o.astype(wide) * do.astype(wide)
    shift_NQ = jnp.sum(both_NQA, axis=-1)
    if dlog_sum_BGQ is not None:
        # The log of the denominator has the weights as its gradient.
        shift_NQ = shift_NQ - dlog_sum_BGQ.reshape(q.shape[:2])
    about = (runs, shift_NQ, log_sum_NQ, do)
    dq, dk, dv = _backward_blocks(scores, window, num_blocks, q, k, v, *about)
    return (
        _heads_last(dq, q_BTHA.shape, G),
        _heads_last(dk, k_BSGA.shape, G),
        _heads_last(dv, v_BSGA.shape, G),
    )


def _blocks(
    num_blocks: int, Q: int, S: int, causal: bool, window: int | None
) -> list[tuple[slice, slice]]:
    """(queries, the keys that they may see at most) of each block; any S will do, blocks need not
    be equal.
    """
    length, r = (S, Q // S) if causal else (Q, 1)
    edges = [length * i // num_blocks for i in range(num_blocks + 1)]
    blocks = []
    for start, stop in itertools.pairwise(edges):
        # The first query of a causal block reaches back the furthest, the last one ends its keys.
        first = 0 if window is None else max(0, start - (window - 1))
        keys = slice(first, stop) if causal else slice(0, S)
        blocks.append((slice(start * r, stop * r), keys))
    return blocks


def _dot(spec: str, a: Array, b: Array) -> Array:
    """An einsum in the dtype of b, added up in a wide one."""
    wide = wide_dtype(b.dtype)
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide)


def _last(runs: tuple[Array, ...], queries: slice, r: int) -> Array:
    """The last key of each query of a block, [N or 1, queries]."""
    if len(runs) > 1:
        return runs[1][:, queries]
    query_Q = jnp.arange(queries.start, queries.stop, dtype=jnp.int32)
    return (query_Q // r)[None]


def _indices(keys: slice) -> Array:
    """The places of a block's keys in their row, [K]."""
    return jnp.arange(keys.start, keys.stop, dtype=jnp.int32)


def _forward_blocks(
    scores: Scores,
    window: int | None,
    num_blocks: int,
    q_NQA: Array,
    k_NSA: Array,
    v_NSA: Array,
    runs: tuple[Array, ...],
) -> tuple[Array, Array]:
    """(o_NQA, log_sum_NQ): the output and the log of the softmax's denominator."""
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    outputs, log_sums = [], []
    for queries, keys in _blocks(num_blocks, Q, S, len(runs) == 1, window):
        q, k_NKA, v_NKA = q_NQA[:, queries], k_NSA[:, keys], v_NSA[:, keys]
        key_11K = _indices(keys)[None, None]
        first_NQ1 = runs[0][:, queries, None]
        last_NQ1 = _last(runs, queries, Q // S)[:, :, None]
        seen_NQK = (key_11K >= first_NQ1) & (key_11K <= last_NQ1)
        score_NQK = scores.of(_dot("NQA,NKA->NQK", q, k_NKA))
        score_NQK = jnp.where(seen_NQK, score_NQK, MASKED)
        # Never as low as MASKED, so that a query which sees nothing has weights of zero, and not of
        # one.
        top_NQ1 = jnp.maximum(jnp.max(score_NQK, axis=-1, keepdims=True), MASKED / 2)
        weight_NQK = jnp.exp(score_NQK - top_NQ1)
        sum_NQ1 = jnp.sum(weight_NQK, axis=-1, keepdims=True)
        sum_NQ1 = jnp.where(sum_NQ1 > 0, sum_NQ1, 1)
        o_NQA = _dot("NQK,NKA->NQA", weight_NQK, v_NKA) / sum_NQ1
        outputs.append(o_NQA.astype(q_NQA.dtype))
        log_sum_NQ1 = top_NQ1 + jnp.log(sum_NQ1)
        log_sums.append(log_sum_NQ1[..., 0])
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(log_sums, axis=1)


def _backward_blocks(
    scores: Scores,
    window: int | None,
    num_blocks: int,
    q_NQA: Array,
    k_NSA: Array,
    v_NSA: Array,
    runs: tuple[Array, ...],
    shift_NQ: Array,
    log_sum_NQ: Array,
    do_NQA: Array,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv).

    Scores lie keys first here: then only one of the five products needs a transposed operand.
    """
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    wide = wide_dtype(q_NQA.dtype)
    dqs = []
    # A key is seen by queries of several blocks, whose gradients are added up.
    dk_NSA = jnp.zeros_like(k_NSA, dtype=wide)
    dv_NSA = jnp.zeros_like(v_NSA, dtype=wide)
    for queries, keys in _blocks(num_blocks, Q, S, len(runs) == 1, window):
        q, do = q_NQA[:, queries], do_NQA[:, queries]
        k_NKA, v_NKA = k_NSA[:, keys], v_NSA[:, keys]
        key_1K1 = _indices(keys)[None, :, None]
        first_N1Q = runs[0][:, None, queries]
        last_N1Q = _last(runs, queries, Q // S)[:, None]
        seen_NKQ = (key_1K1 >= first_N1Q) & (key_1K1 <= last_N1Q)
        # The scores once more, instead of kept from the forward pass.
        score_NKQ = scores.of(_dot("NKA,NQA->NKQ", k_NKA, q))
        weight_NKQ = jnp.exp(score_NKQ - log_sum_NQ[:, None, queries])
        weight_NKQ = jnp.where(seen_NKQ, weight_NKQ, 0)
        dweight_NKQ = _dot("NKA,NQA->NKQ", v_NKA, do)
        dscore_NKQ = weight_NKQ * (dweight_NKQ - shift_NQ[:, None, queries])
        dscore_NKQ = scores.pulled(dscore_NKQ, score_NKQ)
        dqs.append(_dot("NKQ,NKA->NQA", dscore_NKQ, k_NKA) * scores.scale)
        dk_NKA = _dot("NKQ,NQA->NKA", dscore_NKQ, q) * scores.scale
        dv_NKA = _dot("NKQ,NQA->NKA", weight_NKQ, do)
        dk_NSA = dk_NSA.at[:, keys].add(dk_NKA)
        dv_NSA = dv_NSA.at[:, keys].add(dv_NKA)
    dq_NQA = jnp.concatenate(dqs, axis=1)
    return dq_NQA.astype(q_NQA.dtype), dk_NSA.astype(k_NSA.dtype), dv_NSA.astype(v_NSA.dtype)
