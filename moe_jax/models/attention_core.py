"""Attention on the rows and heads of one device: causal, bidirectional, with a bidirectional
prefix, or across rows.

The keys that a query may see are one run, `Keys`: in causal attention from the first token of its
segment to itself. So a mask is two comparisons of a key's index with two numbers per query, which a
CPU's compiler vectorises; comparing segments with each other made the exponentials ten times
slower, measured.

The CPU runs over a few static blocks of queries, each with only the keys that causality allows
where it is known, and over groups of heads whose scores stay in the cache. Only the log of the
softmax's denominator is kept for the backward pass, which computes the scores again (Dao et al.
2022, FlashAttention, arXiv:2205.14135, algorithm 4). Other platforms run the same code as one block
and one group, which is plain XLA.

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

from moe_jax.parallel.compiling import by_platform
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype

MASKED = -1e30  # a score, far below every real one and far from overflow
SCORES = (
    2**19
)  # of a group of heads on a CPU, 2 MB: at S = 256, 8 heads were the fastest of 4, 8, 16 and 64


class Keys(NamedTuple):
    """The keys that each query sees: all from `first` to `last`; none where first > last."""

    first_BT: Array
    last_BT: (
        Any  # () = the query's own place and nothing after it: queries and keys are the same tokens
    )


def causal(segment_BS: Array) -> Keys:
    """Every token sees itself and earlier tokens of its segment.

    Segments are runs of equal ids; 0 is padding.
    """
    return Keys(_first_of_run(segment_BS), ())


def full(segment_BS: Array) -> Keys:
    """Every token sees its whole segment."""
    return Keys(_first_of_run(segment_BS), _last_of_run(segment_BS))


def prefix(segment_BS: Array, prefix_BS: Array) -> Keys:
    """Tokens where `prefix_BS` see the whole prefix of their segment, a run at its beginning;
    others are causal.
    """
    index_1S = jnp.arange(segment_BS.shape[1], dtype=jnp.int32)[None]
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
    first_BT = jnp.where(segment_BT > 0, first_B1, S)
    return Keys(first_BT, jnp.broadcast_to(last_B1, first_BT.shape))


def attention(q_BTHA: Array, k_BSGA: Array, v_BSGA: Array, keys: Keys, *, scale: float) -> Array:
    """o_BTHA: every query attends to its run of keys; softmax in float32 or wider.

    One that sees none gives zero.

    H is a multiple of G; query heads [i * r, (i + 1) * r) share key head i.
    """
    q_BTHA, k_BSGA, v_BSGA, *runs = vary_alike(q_BTHA, k_BSGA, v_BSGA, *jax.tree.leaves(keys))
    B, T, H, A = q_BTHA.shape
    G = k_BSGA.shape[2]

    def heads_first(z):
        return jnp.swapaxes(z.reshape(B, z.shape[1], G, -1), 1, 2).reshape(B * G, -1, A)

    def of_heads(z_BT):
        return jnp.broadcast_to(z_BT[:, None, :, None], (B, G, T, H // G)).reshape(B * G, -1)

    runs = tuple(of_heads(z_BT) for z_BT in runs)
    o_NQA = _core(scale, heads_first(q_BTHA), heads_first(k_BSGA), heads_first(v_BSGA), runs)
    return jnp.swapaxes(o_NQA.reshape(B, G, T, -1), 1, 2).reshape(B, T, H, A)


def decode_attention(
    q_BqHA: Array, k_BSGA: Array, v_BSGA: Array, mask_BqS: Array, *, scale: float
) -> Array:
    """o_BqHA of a few queries against a cache of keys and values, where `mask_BqS` says which a
    query may see.

    A query that may see nothing gives zero.
    """
    B, q, H, A = q_BqHA.shape
    wide = wide_dtype(q_BqHA.dtype)
    q_BqGrA = q_BqHA.reshape(B, q, k_BSGA.shape[2], -1, A)
    score_BGrqS = (
        jnp.einsum("BqGrA,BSGA->BGrqS", q_BqGrA, k_BSGA, preferred_element_type=wide) * scale
    )
    seen_BGrqS = mask_BqS[:, None, None]
    weight_BGrqS = jnp.where(
        seen_BGrqS, jax.nn.softmax(jnp.where(seen_BGrqS, score_BGrqS, MASKED)), 0
    )
    o_BqGrA = jnp.einsum(
        "BGrqS,BSGA->BqGrA", weight_BGrqS.astype(v_BSGA.dtype), v_BSGA, preferred_element_type=wide
    )
    return o_BqGrA.reshape(B, q, H, A).astype(q_BqHA.dtype)


def _first_of_run(segment_BS: Array) -> Array:
    """Index of the first token of each token's segment; S, which no key has, for padding."""
    S = segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    changes_BS = segment_BS != jnp.roll(segment_BS, 1, axis=1)
    first_BS = lax.cummax(jnp.where(changes_BS, index_1S, 0), axis=1)
    return jnp.where(segment_BS > 0, first_BS, S)


def _last_of_run(segment_BS: Array) -> Array:
    """Index of the last token of each token's segment."""
    S = segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    changes_BS = segment_BS != jnp.roll(segment_BS, -1, axis=1)
    return lax.cummin(jnp.where(changes_BS, index_1S, S - 1), axis=1, reverse=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(scale: float, q_NQA: Array, k_NSA: Array, v_NSA: Array, runs: tuple[Array, ...]) -> Array:
    """`runs`: (first_NQ,) in causal attention, else (first_NQ, last_NQ)."""
    return _forward(scale, q_NQA, k_NSA, v_NSA, runs)[0]


def _forward(scale: float, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    o_NQA, log_sum_NQ = _by_platform(functools.partial(_forward_blocks, scale), *inputs)
    return o_NQA, (*inputs, o_NQA, log_sum_NQ)


def _backward(scale: float, residue: tuple[Any, ...], do_NQA: Array) -> tuple[Any, ...]:
    return *_by_platform(functools.partial(_backward_blocks, scale), *residue, do_NQA), None


_core.defvjp(_forward, _backward)


def _by_platform(run: Any, *args: Any) -> Any:
    """Switches by platform, here and nowhere else.

    `run(num_blocks, *args)`, in blocks and groups of heads where compiled for a CPU, else at once.
    """
    N, Q, _ = args[0].shape
    S = args[1].shape[1]
    length = S if len(args[3]) == 1 else Q
    num_blocks = 8 if length >= 1024 else max(1, min(4, length // 64))
    fitting = max(4, SCORES // (Q * S))
    group = max(n for n in range(1, N + 1) if N % n == 0 and n <= fitting)

    def in_groups(*args):
        if group == N:
            return run(num_blocks, *args)

        def split(z):
            return z.reshape(N // group, group, *z.shape[1:])

        def join(z):
            return z.reshape(N, *z.shape[2:])

        return jax.tree.map(
            join, lax.map(lambda one: run(num_blocks, *one), jax.tree.map(split, args))
        )

    return by_platform(*args, cpu=in_groups, others=functools.partial(run, 1))


def _blocks(num_blocks: int, Q: int, S: int, causal: bool) -> list[tuple[slice, int]]:
    """(queries, number of keys they may see at most) of each block; any S will do, blocks need not
    be equal.
    """
    length, r = (S, Q // S) if causal else (Q, 1)
    edges = [length * i // num_blocks for i in range(num_blocks + 1)]
    return [
        (slice(start * r, stop * r), stop if causal else S)
        for start, stop in itertools.pairwise(edges)
    ]


def _dot(spec: str, a: Array, b: Array) -> Array:
    """An einsum in the dtype of b, added up in a wide one."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide_dtype(b.dtype))


def _last(runs: tuple[Array, ...], queries: slice, r: int) -> Array:
    """The last key of each query of a block, [N or 1, queries]."""
    if len(runs) > 1:
        return runs[1][:, queries]
    return (jnp.arange(queries.start, queries.stop, dtype=jnp.int32) // r)[None]


def _forward_blocks(
    scale: float, num_blocks: int, q_NQA: Array, k_NSA: Array, v_NSA: Array, runs: tuple[Array, ...]
) -> tuple[Array, Array]:
    """(o_NQA, log_sum_NQ): the output and the log of the softmax's denominator."""
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    outputs, log_sums = [], []
    for queries, K in _blocks(num_blocks, Q, S, len(runs) == 1):
        key_1K = jnp.arange(K, dtype=jnp.int32)[None, None]
        seen_NQK = (key_1K >= runs[0][:, queries, None]) & (
            key_1K <= _last(runs, queries, Q // S)[:, :, None]
        )
        score_NQK = _dot("NQA,NKA->NQK", q_NQA[:, queries], k_NSA[:, :K]) * scale
        score_NQK = jnp.where(seen_NQK, score_NQK, MASKED)
        # never as low as MASKED, so that a query which sees nothing has weights of zero, and not of
        # one
        top_NQ1 = jnp.maximum(jnp.max(score_NQK, axis=-1, keepdims=True), MASKED / 2)
        weight_NQK = jnp.exp(score_NQK - top_NQ1)
        sum_NQ1 = jnp.sum(weight_NQK, axis=-1, keepdims=True)
        sum_NQ1 = jnp.where(sum_NQ1 > 0, sum_NQ1, 1)
        outputs.append(
            (_dot("NQK,NKA->NQA", weight_NQK, v_NSA[:, :K]) / sum_NQ1).astype(q_NQA.dtype)
        )
        log_sums.append((top_NQ1 + jnp.log(sum_NQ1))[..., 0])
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(log_sums, axis=1)


def _backward_blocks(
    scale: float,
    num_blocks: int,
    q_NQA: Array,
    k_NSA: Array,
    v_NSA: Array,
    runs: tuple[Array, ...],
    o_NQA: Array,
    log_sum_NQ: Array,
    do_NQA: Array,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv).

    Scores lie keys first here: then only one of the five products needs a transposed operand.
    """
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    wide = wide_dtype(q_NQA.dtype)
    shift_NQ = jnp.sum(o_NQA.astype(wide) * do_NQA.astype(wide), axis=-1)
    dqs = []
    dk_NSA, dv_NSA = jnp.zeros_like(k_NSA, dtype=wide), jnp.zeros_like(v_NSA, dtype=wide)
    for queries, K in _blocks(num_blocks, Q, S, len(runs) == 1):
        q, do, k_NKA, v_NKA = q_NQA[:, queries], do_NQA[:, queries], k_NSA[:, :K], v_NSA[:, :K]
        key_K1 = jnp.arange(K, dtype=jnp.int32)[None, :, None]
        seen_NKQ = (key_K1 >= runs[0][:, None, queries]) & (
            key_K1 <= _last(runs, queries, Q // S)[:, None]
        )
        score_NKQ = _dot("NKA,NQA->NKQ", k_NKA, q) * scale
        weight_NKQ = jnp.where(seen_NKQ, jnp.exp(score_NKQ - log_sum_NQ[:, None, queries]), 0)
        dscore_NKQ = weight_NKQ * (_dot("NKA,NQA->NKQ", v_NKA, do) - shift_NQ[:, None, queries])
        dqs.append(_dot("NKQ,NKA->NQA", dscore_NKQ, k_NKA) * scale)
        dk_NSA = dk_NSA.at[:, :K].add(_dot("NKQ,NQA->NKA", dscore_NKQ, q) * scale)
        dv_NSA = dv_NSA.at[:, :K].add(_dot("NKQ,NQA->NKA", weight_NKQ, do))
    dq_NQA = jnp.concatenate(dqs, axis=1)
    return dq_NQA.astype(q_NQA.dtype), dk_NSA.astype(k_NSA.dtype), dv_NSA.astype(v_NSA.dtype)
