"""Attention in a few static blocks of queries, each with only the keys that causality and a window
allow where they are known. The scores of a block are whole, so memory grows with S^2.

Shapes: see attention_core.py.
"""

import itertools
from typing import Any

import jax.numpy as jnp
from jax import Array

from moe_jax.models import attention_bias
from moe_jax.models.attention_bias import Bias
from moe_jax.models.attention_layout import (
    MASKED,
    Reach,
    Scores,
    dot,
    heads_first,
    heads_last,
    runs_of_queries,
    shift,
)
from moe_jax.parallel.outer import outer
from moe_jax.precision import wide_dtype

# Blocks begin and end at multiples of so many, a vector of AVX-512, as their first keys do: an odd
# number of keys would have the slow product of parallel/outer.py.
VECTOR = 16


def forward(
    scores: Scores,
    reach: Reach,
    num_blocks: int,
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    bounds: tuple[Array, ...],
    bias_BHL: Any,
) -> tuple[Array, Array]:
    """Returns (o_BTHA, log_sum_BGQ)."""
    B, T, H, _ = q_BTHA.shape
    G = k_BSGA.shape[2]
    bias = attention_bias.of_kernel(scores.buckets, bias_BHL, reach, T, G)
    q, k, v = (heads_first(z, G) for z in (q_BTHA, k_BSGA, v_BSGA))
    runs = runs_of_queries(bounds, H, G)
    o_NQA, log_sum_NQ = _forward_blocks(scores, reach, num_blocks, q, k, v, runs, bias)
    o_shape = (*q_BTHA.shape[:3], v_BSGA.shape[3])
    return heads_last(o_NQA, o_shape, G), log_sum_NQ.reshape(B, G, -1)


def backward(
    scores: Scores,
    reach: Reach,
    num_blocks: int,
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    bounds: tuple[Array, ...],
    bias_BHL: Any,
    o_BTHA: Array,
    log_sum_BGQ: Array,
    do_BTHA: Array,
    dlog_sum_BGQ: Array | None,
) -> tuple[Array, Array, Array, Any]:
    """Returns (dq_BTHA, dk_BSGA, dv_BSGA, dbias_BHL)."""
    T, G = q_BTHA.shape[1], k_BSGA.shape[2]
    bias = attention_bias.of_kernel(scores.buckets, bias_BHL, reach, T, G)
    q, k, v, o, do = (heads_first(z, G) for z in (q_BTHA, k_BSGA, v_BSGA, o_BTHA, do_BTHA))
    runs = runs_of_queries(bounds, q_BTHA.shape[2], G)
    log_sum_NQ = log_sum_BGQ.reshape(q.shape[:2])
    dlog_sum_NQ = None if dlog_sum_BGQ is None else dlog_sum_BGQ.reshape(q.shape[:2])
    about = (runs, shift(o, do, dlog_sum_NQ), log_sum_NQ, do, bias)
    dq, dk, dv, dbias_NX = _backward_blocks(scores, reach, num_blocks, q, k, v, *about)
    return (
        heads_last(dq, q_BTHA.shape, G),
        heads_last(dk, k_BSGA.shape, G),
        heads_last(dv, v_BSGA.shape, G),
        () if bias is None else dbias_NX.reshape(bias_BHL.shape).astype(bias_BHL.dtype),
    )


def _blocks(
    num_blocks: int, Q: int, S: int, causal: bool, window: int | None
) -> list[tuple[slice, slice]]:
    """Returns (queries, the keys that they may see at most) of each block; any S will do, blocks
    need not be equal, and there are fewer where they would be shorter than a vector.
    """
    # A causal block begins with a whole token, because its keys end with one: r queries of each.
    length, r = (S, Q // S) if causal else (Q, 1)
    inner = (length * i // num_blocks // VECTOR * VECTOR for i in range(1, num_blocks))
    edges = sorted({0, *inner, length})
    blocks = []
    for start, stop in itertools.pairwise(edges):
        # The first query of a causal block reaches back the furthest, the last one ends its keys.
        first = 0 if window is None else max(0, start - (window - 1)) // VECTOR * VECTOR
        keys = slice(first, stop) if causal else slice(0, S)
        blocks.append((slice(start * r, stop * r), keys))
    return blocks


def _last(runs: tuple[Array, ...], queries: slice, r: int) -> Array:
    """Returns the last key of each query of a block, [N or 1, queries]."""
    if len(runs) > 1:
        return runs[1][:, queries]
    # Causal: its own token.
    query_Q = jnp.arange(queries.start, queries.stop, dtype=jnp.int32)
    return (query_Q // r)[None]


def _indices(keys: slice) -> Array:
    """Returns the places of a block's keys in their row, [K]."""
    return jnp.arange(keys.start, keys.stop, dtype=jnp.int32)


def _forward_blocks(
    scores: Scores,
    reach: Reach,
    num_blocks: int,
    q_NQA: Array,
    k_NSA: Array,
    v_NSA: Array,
    runs: tuple[Array, ...],
    bias: Bias | None,
) -> tuple[Array, Array]:
    """Returns (o_NQA, log_sum_NQ): the output and the log of the softmax's denominator."""
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    outputs, log_sums = [], []
    for queries, keys in _blocks(num_blocks, Q, S, len(runs) == 1, reach.window):
        # The part of the rows that this block reads.
        q, k_NKA, v_NKA = q_NQA[:, queries], k_NSA[:, keys], v_NSA[:, keys]
        key_11K = _indices(keys)[None, None]
        first_NQ1 = runs[0][:, queries, None]
        last_NQ1 = _last(runs, queries, Q // S)[:, :, None]
        seen_NQK = (key_11K >= first_NQ1) & (key_11K <= last_NQ1)
        # softmax(Q K^T) V: scores relative to the highest, so that no exponential overflows.
        score_NQK = scores.of(dot("NQA,NKA->NQK", q, k_NKA))
        if bias is not None:
            bucket_QK = bias.bucket(queries.start, q.shape[1], _indices(keys))
            score_NQK = score_NQK + bias.added(bucket_QK, queries.start)
        score_NQK = jnp.where(seen_NQK, score_NQK, MASKED)
        # Never as low as MASKED, so that a query which sees nothing has weights of zero, and not of
        # one.
        top_NQ1 = jnp.maximum(jnp.max(score_NQK, axis=-1, keepdims=True), MASKED / 2)
        weight_NQK = jnp.exp(score_NQK - top_NQ1)
        sum_NQ1 = jnp.sum(weight_NQK, axis=-1, keepdims=True)
        sum_NQ1 = jnp.where(sum_NQ1 > 0, sum_NQ1, 1)
        # Divided last: there are fewer outputs than weights.
        o_NQA = dot("NQK,NKA->NQA", weight_NQK, v_NKA) / sum_NQ1
        outputs.append(o_NQA.astype(q_NQA.dtype))
        log_sum_NQ1 = top_NQ1 + jnp.log(sum_NQ1)
        log_sums.append(log_sum_NQ1[..., 0])
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(log_sums, axis=1)


def _backward_blocks(
    scores: Scores,
    reach: Reach,
    num_blocks: int,
    q_NQA: Array,
    k_NSA: Array,
    v_NSA: Array,
    runs: tuple[Array, ...],
    shift_NQ: Array,
    log_sum_NQ: Array,
    do_NQA: Array,
    bias: Bias | None,
) -> tuple[Array, Array, Array, Any]:
    """Returns (dq, dk, dv, the gradient of the bias [N, X]; 0 without one).

    Scores lie keys first here: then only one of the five products needs a transposed operand.
    """
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    wide = wide_dtype(q_NQA.dtype)
    dqs = []
    dbias_NX: Any = 0
    # A key is seen by queries of several blocks, whose gradients are added up.
    dk_NSA = jnp.zeros_like(k_NSA, dtype=wide)
    dv_NSA = jnp.zeros_like(v_NSA, dtype=wide)
    for queries, keys in _blocks(num_blocks, Q, S, len(runs) == 1, reach.window):
        q, do = q_NQA[:, queries], do_NQA[:, queries]
        k_NKA, v_NKA = k_NSA[:, keys], v_NSA[:, keys]
        key_1K1 = _indices(keys)[None, :, None]
        first_N1Q = runs[0][:, None, queries]
        last_N1Q = _last(runs, queries, Q // S)[:, None]
        seen_NKQ = (key_1K1 >= first_N1Q) & (key_1K1 <= last_N1Q)
        # The scores once more, instead of kept from the forward pass.
        score_NKQ = scores.of(dot("NKA,NQA->NKQ", k_NKA, q))
        biased_NKQ = score_NKQ
        bucket_QK: Any = None
        if bias is not None:
            bucket_QK = bias.bucket(queries.start, q.shape[1], _indices(keys))
            added_NQK = bias.added(bucket_QK, queries.start)
            biased_NKQ = score_NKQ + jnp.swapaxes(added_NQK, 1, 2)
        weight_NKQ = jnp.exp(biased_NKQ - log_sum_NQ[:, None, queries])
        weight_NKQ = jnp.where(seen_NKQ, weight_NKQ, 0)
        # dP = dO V^T and dS = P (dP - shift), with P the weights (attention_chunks.py).
        dweight_NKQ = dot("NKA,NQA->NKQ", v_NKA, do)
        dscore_NKQ = weight_NKQ * (dweight_NKQ - shift_NQ[:, None, queries])
        if bias is not None:
            dbias_NX += bias.gradient(dscore_NKQ, bucket_QK.T, queries.start, 1)
        dscore_NKQ = scores.pulled(dscore_NKQ, score_NKQ)
        # dQ = dS K, dK = dS^T Q and dV = P^T dO.
        dqs.append(outer(dscore_NKQ.astype(k_NKA.dtype), k_NKA, wide) * scores.scale)
        dk_NKA = dot("NKQ,NQA->NKA", dscore_NKQ, q) * scores.scale
        dv_NKA = dot("NKQ,NQA->NKA", weight_NKQ, do)
        dk_NSA = dk_NSA.at[:, keys].add(dk_NKA)
        dv_NSA = dv_NSA.at[:, keys].add(dv_NKA)
    dq_NQA = jnp.concatenate(dqs, axis=1)
    dk_NSA, dv_NSA = dk_NSA.astype(k_NSA.dtype), dv_NSA.astype(v_NSA.dtype)
    return dq_NQA.astype(q_NQA.dtype), dk_NSA, dv_NSA, dbias_NX
