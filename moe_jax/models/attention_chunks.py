"""Attention in chunks of queries and keys, in plain XLA: memory is linear in S, both ways.

The softmax of a query goes on from chunk to chunk of its keys (Milakov & Gimelshein 2018,
arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135). One loop
of known length runs over pairs of a chunk of queries and a chunk of keys. A pair that causality or
the window masks entirely is not in the list.

Shapes: see attention_core.py; C queries of a chunk, K keys of a chunk.
"""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moe_jax.models import attention_bias
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
from moe_jax.parallel import context
from moe_jax.parallel.outer import outer
from moe_jax.precision import wide_dtype

# Tokens of a chunk where heads are few; 256 KB of scores of a head on a CPU.
CHUNK, CHUNK_ON_CPU = 512, 256
# Scores of a pair over all rows and heads: 256 MB.
SCORES = 2**26


def chunk_tokens(num_heads: int) -> int:
    """Returns the tokens of a chunk for a number of heads of all rows of a device."""
    chunk = CHUNK
    while chunk > 128 and num_heads * chunk**2 > SCORES:
        chunk //= 2
    return chunk


class _Plan(NamedTuple):
    """Holds how rows are cut: static numbers, and the arrays that the loop reads."""

    # Queries of a chunk: those of its tokens, r of each.
    queries: int
    # Keys of a chunk.
    keys: int
    # Queries of a token that share a key head: H / G.
    r: int
    # Lengths up to whole chunks, in tokens.
    padded_T: int
    padded_S: int
    # The chunk of queries and that of keys of each pair.
    pairs: tuple[Array, Array]


def pairs_seen(
    num_queries: int, num_keys: int, chunk: tuple[int, int], causal: bool, window: int | None
) -> list[tuple[int, int]]:
    """Returns the pairs (chunk of queries, chunk of keys) that are not masked entirely, in tokens.

    There are `num_queries` chunks of chunk[0] tokens and `num_keys` of chunk[1].
    """
    seen = []
    query_tokens, key_tokens = chunk
    for i, j in itertools.product(range(num_queries), range(num_keys)):
        first_token, last_token = i * query_tokens, (i + 1) * query_tokens - 1
        first_key, last_key = j * key_tokens, (j + 1) * key_tokens - 1
        # Even the last token of the chunk comes before all of its keys.
        is_later = causal and first_key > last_token
        # Even for its first token all keys lie before the window.
        is_too_early = window is not None and last_key < first_token - (window - 1)
        if not is_later and not is_too_early:
            seen.append((i, j))
    return seen


def pairs_of_devices(
    num_tokens: int, num_keys: int, chunk: tuple[int, int], reach: Reach
) -> np.ndarray:
    """Returns the pairs of each device of the axis `seq`, int32 [n, P, 2], in tokens.

    Each has `num_tokens` queries, whose chunks are of chunk[0] tokens, and the `num_keys` chunks of
    chunk[1] keys of whole rows. All have as many pairs: a device with fewer, by a window or by
    chunks that do not divide its tokens, has some that are masked entirely.
    """
    query_tokens, key_tokens = chunk
    row_tokens = num_tokens * reach.shards
    # No window is one as long as the row.
    window = reach.window or row_tokens
    first_key_1K = np.arange(num_keys)[None] * key_tokens
    last_key_1K = first_key_1K + key_tokens - 1
    # Of each device, the pairs that are computed and those that are masked entirely.
    listed = []
    for place_T in context.places(reach.shards, row_tokens):
        place_T1 = place_T[:, None]
        # A token sees some key of a chunk: the first is not later, the last is in the window.
        seen_TK = (place_T1 >= first_key_1K) & (place_T1 - (window - 1) <= last_key_1K)
        if not reach.causal:
            seen_TK[:] = True
        # A chunk of queries sees what any of them sees.
        seen = np.logical_or.reduceat(seen_TK, np.arange(0, num_tokens, query_tokens))
        listed.append((np.argwhere(seen), np.argwhere(~seen)))
    most = max(len(pairs) for pairs, _ in listed)
    filled = []
    for pairs, unseen in listed:
        # One pair that is masked entirely, as often as it takes: it adds nothing.
        filler = np.repeat(unseen[:1], most - len(pairs), axis=0)
        filled.append(np.concatenate([pairs, filler]))
    return np.stack(filled).astype(np.int32)


def _plan(q_BTHA: Array, k_BSGA: Array, reach: Reach, chunk: int) -> _Plan:
    """Returns how rows of these shapes are cut into chunks of at most `chunk` tokens."""
    T, H = q_BTHA.shape[1:3]
    S, G = k_BSGA.shape[1:3]
    # The two chunks of a row that a device has (parallel/context.py) stand far from each other.
    longest = T if reach.shards == 1 else T // context.CHUNKS
    tokens, keys = min(chunk, longest), min(chunk, S)
    num_queries, num_keys = -(-T // tokens), -(-S // keys)
    if reach.shards == 1:
        pairs = pairs_seen(num_queries, num_keys, (tokens, keys), reach.causal, reach.window)
        query_p, key_p = np.asarray(pairs, np.int32).T
    else:
        # All devices run one program, so each looks up its own list.
        pairs_np2 = jnp.asarray(pairs_of_devices(T, num_keys, (tokens, keys), reach))
        device = lax.axis_index(context.AXIS)
        query_p, key_p = lax.dynamic_index_in_dim(pairs_np2, device, keepdims=False).T
    r = H // G
    return _Plan(
        queries=tokens * r,
        keys=keys,
        r=r,
        padded_T=num_queries * tokens,
        padded_S=num_keys * keys,
        pairs=(jnp.asarray(query_p), jnp.asarray(key_p)),
    )


def _padded(z_BT: Array, length: int, value: int = 0) -> Array:
    """Returns [B, length, ...] of [B, T, ...]: a value behind the last token."""
    more = length - z_BT.shape[1]
    widths = [(0, 0), (0, more)] + [(0, 0)] * (z_BT.ndim - 2)
    return jnp.pad(z_BT, widths, constant_values=value)


def _padded_runs(bounds: tuple[Array, ...], plan: _Plan, H: int, G: int) -> tuple[Array, ...]:
    """Returns the bounds of each query [N, Q]; padding sees nothing."""
    # Its first key lies behind the last one, and its last key before the first one.
    first_BT = _padded(bounds[0], plan.padded_T, plan.padded_S)
    others = [_padded(z_BT, plan.padded_T, -1) for z_BT in bounds[1:]]
    return runs_of_queries((first_BT, *others), H, G)


class _Pair(NamedTuple):
    """Holds where the chunks of one pair begin, in queries and in keys."""

    query: Array
    key: Array
    plan: _Plan

    def queries(self, z_NQ: Array) -> Array:
        return lax.dynamic_slice_in_dim(z_NQ, self.query, self.plan.queries, 1)

    def keys(self, z_NS: Array) -> Array:
        return lax.dynamic_slice_in_dim(z_NS, self.key, self.plan.keys, 1)

    def put_queries(self, z_NQ: Array, new_NC: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(z_NQ, new_NC, self.query, 1)

    def put_keys(self, z_NS: Array, new_NK: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(z_NS, new_NK, self.key, 1)

    def key_places(self) -> Array:
        """Returns the places of the keys in their row, [K]."""
        return self.key + jnp.arange(self.plan.keys, dtype=jnp.int32)

    def seen(self, runs: tuple[Array, ...]) -> Array:
        """Returns which keys each query sees, [N, C, K]."""
        key_11K = self.key_places()[None, None]
        first_NC1 = self.queries(runs[0])[:, :, None]
        if len(runs) > 1:
            last_NC1 = self.queries(runs[1])[:, :, None]
        else:
            # Without a bound of its own a query sees up to its token: r queries are of one token.
            query_C = self.query + jnp.arange(self.plan.queries, dtype=jnp.int32)
            last_NC1 = (query_C // self.plan.r)[None, :, None]
        return (key_11K >= first_NC1) & (key_11K <= last_NC1)


def _fold(step: Any, carry: Any, plan: _Plan) -> Any:
    """Folds `step(carry, pair)` over all pairs."""

    def one(carry: Any, pair: tuple[Array, Array]) -> tuple[Any, None]:
        query, key = pair
        return step(carry, _Pair(query * plan.queries, key * plan.keys, plan)), None

    carry, _ = lax.scan(one, carry, plan.pairs)
    return carry


def _in_order(
    q_BTHA: Array, bounds: tuple[Array, ...], plan: _Plan
) -> tuple[Array, tuple[Array, ...], _Plan]:
    """Returns them so that nothing is computed of the others before the queries are there.

    Masks depend on bounds and pairs alone, so JAX would compute those of all pairs before a loop
    over layers that is differentiated, and keep them: S^2 numbers for each head.
    """
    q_BTHA, bounds, pairs = lax.optimization_barrier((q_BTHA, bounds, plan.pairs))
    return q_BTHA, bounds, plan._replace(pairs=pairs)


def forward(
    scores: Scores,
    reach: Reach,
    chunk: int,
    q_BTHA: Array,
    k_BSGA: Array,
    v_BSGA: Array,
    bounds: tuple[Array, ...],
    bias_BHL: Any,
) -> tuple[Array, Array]:
    """Returns (o_BTHA, log_sum_BGQ): the output and the log of the softmax's denominator."""
    B, T, H, _ = q_BTHA.shape
    G, V = v_BSGA.shape[2:]
    # 1. Rows are padded to whole chunks. N = B G runs over rows and key heads.
    plan = _plan(q_BTHA, k_BSGA, reach, chunk)
    q_BTHA, bounds, plan = _in_order(q_BTHA, bounds, plan)
    q_NQA = heads_first(_padded(q_BTHA, plan.padded_T), G)
    k_NSA, v_NSA = (heads_first(_padded(z, plan.padded_S), G) for z in (k_BSGA, v_BSGA))
    runs = _padded_runs(bounds, plan, H, G)
    bias = attention_bias.of_kernel(scores.buckets, bias_BHL, reach, T, G)

    def step(carry: tuple[Array, ...], pair: _Pair) -> tuple[Array, ...]:
        # The output so far without its denominator, the highest score, and the denominator.
        o_NCA, top_NC, sum_NC = (pair.queries(z) for z in carry)
        score_NCK = scores.of(dot("NCA,NKA->NCK", pair.queries(q_NQA), pair.keys(k_NSA)))
        if bias is not None:
            # A chunk begins with the first query of a token.
            bucket_CK = bias.bucket(pair.query, plan.queries, pair.key_places())
            score_NCK = score_NCK + bias.added(bucket_CK, 0)
        score_NCK = jnp.where(pair.seen(runs), score_NCK, MASKED)
        # The carry begins above MASKED, so that what is not seen has a weight of zero.
        new_top_NC = jnp.maximum(top_NC, jnp.max(score_NCK, axis=-1))
        weight_NCK = jnp.exp(score_NCK - new_top_NC[..., None])
        # What was summed below an older top is put below the new one.
        shrunk_NC = jnp.exp(top_NC - new_top_NC)
        sum_NC = sum_NC * shrunk_NC + jnp.sum(weight_NCK, axis=-1)
        read_NCA = dot("NCK,NKA->NCA", weight_NCK, pair.keys(v_NSA))
        o_NCA = o_NCA * shrunk_NC[..., None] + read_NCA
        new = (o_NCA, new_top_NC, sum_NC)
        return tuple(pair.put_queries(z, some) for z, some in zip(carry, new))

    # 2. The softmax goes on from pair to pair, in wide numbers.
    wide = wide_dtype(q_BTHA.dtype)
    zero_NQA = jnp.zeros_like(q_NQA, shape=(*q_NQA.shape[:2], V), dtype=wide)
    zero_NQ = jnp.zeros_like(q_NQA, shape=q_NQA.shape[:2], dtype=wide)
    o_NQA, top_NQ, sum_NQ = _fold(step, (zero_NQA, zero_NQ + MASKED / 2, zero_NQ), plan)
    # 3. One division at the end. A query that sees nothing gets zeros, and not NaN.
    sum_NQ = jnp.where(sum_NQ > 0, sum_NQ, 1)
    o_NQA = (o_NQA / sum_NQ[..., None]).astype(q_BTHA.dtype)
    o_BTHA = heads_last(o_NQA, (B, plan.padded_T, H, V), G)[:, :T]
    log_sum_BGQ = (top_NQ + jnp.log(sum_NQ)).reshape(B, G, -1)[:, :, : T * plan.r]
    return o_BTHA, log_sum_BGQ


def backward(
    scores: Scores,
    reach: Reach,
    chunk: int,
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
    """Returns (dq_BTHA, dk_BSGA, dv_BSGA, dbias_BHL); the scores are computed again.

    With P the weights and L the loss: dV = P^T dO, dP = dO V^T, dS = P (dP - shift), dQ = dS K and
    dK = dS^T Q (Dao et al. 2022, arXiv:2205.14135, appendix B.2; shift is their D).
    """
    B, T, H, A = q_BTHA.shape
    S, G = k_BSGA.shape[1:3]
    # 1. Rows are padded as on the way forward.
    plan = _plan(q_BTHA, k_BSGA, reach, chunk)
    q_BTHA, bounds, plan = _in_order(q_BTHA, bounds, plan)
    of_queries = (q_BTHA, o_BTHA, do_BTHA)
    q_NQA, o_NQA, do_NQA = (heads_first(_padded(z, plan.padded_T), G) for z in of_queries)
    k_NSA, v_NSA = (heads_first(_padded(z, plan.padded_S), G) for z in (k_BSGA, v_BSGA))
    runs = _padded_runs(bounds, plan, H, G)
    log_sum_NQ = _padded(log_sum_BGQ.reshape(B * G, -1), q_NQA.shape[1])
    wide, dlog_sum_NQ = wide_dtype(q_BTHA.dtype), None
    if dlog_sum_BGQ is not None:
        dlog_sum_NQ = _padded(dlog_sum_BGQ.reshape(B * G, -1), q_NQA.shape[1])
    # One number for each query: it does not depend on the key, so it is summed once.
    shift_NQ = shift(o_NQA, do_NQA, dlog_sum_NQ)
    bias = attention_bias.of_kernel(scores.buckets, bias_BHL, reach, T, G)

    def step(carry: tuple[Array, ...], pair: _Pair) -> tuple[Array, ...]:
        dq_NQA, dk_NSA, dv_NSA, *of_bias = carry
        q_NCA, do_NCA = pair.queries(q_NQA), pair.queries(do_NQA)
        k_NKA, v_NKA = pair.keys(k_NSA), pair.keys(v_NSA)
        score_NCK = scores.of(dot("NCA,NKA->NCK", q_NCA, k_NKA))
        biased_NCK = score_NCK
        bucket_CK: Any = None
        if bias is not None:
            bucket_CK = bias.bucket(pair.query, plan.queries, pair.key_places())
            biased_NCK = score_NCK + bias.added(bucket_CK, 0)
        # The denominator is known by now, so the weights are those of the whole softmax.
        weight_NCK = jnp.exp(biased_NCK - pair.queries(log_sum_NQ)[..., None])
        weight_NCK = jnp.where(pair.seen(runs), weight_NCK, 0)
        dweight_NCK = dot("NCA,NKA->NCK", do_NCA, v_NKA)
        dscore_NCK = weight_NCK * (dweight_NCK - pair.queries(shift_NQ)[..., None])
        if bias is not None:
            of_bias = [of_bias[0] + bias.gradient(dscore_NCK, bucket_CK, 0, 0)]
        # Through what was done to the scores (a soft cap).
        dscore_NCK = scores.pulled(dscore_NCK, score_NCK)
        dq_NCA = dot("NCK,NKA->NCA", dscore_NCK, k_NKA) * scores.scale
        dk_NKA = outer(dscore_NCK.astype(q_NCA.dtype), q_NCA, wide) * scores.scale
        dv_NKA = outer(weight_NCK.astype(do_NCA.dtype), do_NCA, wide)
        return (
            pair.put_queries(dq_NQA, pair.queries(dq_NQA) + dq_NCA),
            pair.put_keys(dk_NSA, pair.keys(dk_NSA) + dk_NKA),
            pair.put_keys(dv_NSA, pair.keys(dv_NSA) + dv_NKA),
            *of_bias,
        )

    # 2. The gradients are summed over all pairs, in wide numbers.
    biases = () if bias is None else (bias.number_NX,)
    zeros = tuple(jnp.zeros_like(z, dtype=wide) for z in (q_NQA, k_NSA, v_NSA, *biases))
    dq_NQA, dk_NSA, dv_NSA, *of_bias = _fold(step, zeros, plan)
    dbias_BHL: Any = ()
    if bias is not None:
        dbias_BHL = of_bias[0].reshape(bias_BHL.shape).astype(bias_BHL.dtype)
    # 3. Back to rows and heads, without the padding.
    dq_BTHA = heads_last(dq_NQA.astype(q_BTHA.dtype), (B, plan.padded_T, H, A), G)
    of_keys = (B, plan.padded_S, G)
    dk_BSGA = heads_last(dk_NSA.astype(k_BSGA.dtype), (*of_keys, A), G)
    dv_BSGA = heads_last(dv_NSA.astype(v_BSGA.dtype), (*of_keys, v_BSGA.shape[3]), G)
    return dq_BTHA[:, :T], dk_BSGA[:, :S], dv_BSGA[:, :S], dbias_BHL
