"""Causal attention within segments, on the rows and heads of one device.

Tokens that a query may see are one run of keys: from the first token of its segment to itself. So a mask is two
comparisons of a key's index with two numbers per query, which a CPU's compiler vectorises; comparing segments with
each other made the exponentials ten times slower, measured.

The CPU runs over a few static blocks of queries, each with only the keys that causality allows, and over groups of
heads whose scores stay in the cache. Only the log of the softmax's denominator is kept for the backward pass, which
computes the scores again (Dao et al. 2022, FlashAttention, arXiv:2205.14135, algorithm 4). Other platforms run the
same code as one block and one group, which is plain XLA.

B rows, S sequence, H query heads, G key and value heads, r = H / G query heads per key head, A head width, N = B * G,
Q = S * r queries of a key head (query i belongs to token i // r), K keys of a block.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.grouped_matmul import vary_alike, wide_dtype

MASKED = -1e30  # a score, far below every real one and far from overflow
SCORES = 2**19  # of a group of heads on a CPU, 2 MB: at S = 256, 8 heads were the fastest of 4, 8, 16 and 64


def attention(q_BSHA: Array, k_BSGA: Array, v_BSGA: Array, segment_BS: Array, *, scale: float) -> Array:
    """o_BSHA: every token attends to itself and to earlier tokens of its segment; softmax in float32 or wider.

    Segments are contiguous runs of equal ids. Segment 0 is padding: it attends to nothing and gives zero. H is a
    multiple of G; query heads [i * r, (i + 1) * r) share key head i.
    """
    q_BSHA, k_BSGA, v_BSGA, segment_BS = vary_alike(q_BSHA, k_BSGA, v_BSGA, segment_BS)
    B, S, H, A = q_BSHA.shape
    G = k_BSGA.shape[2]
    heads_first = lambda z: jnp.swapaxes(z.reshape(B, S, G, -1), 1, 2).reshape(B * G, -1, A)
    first_BGSr = jnp.broadcast_to(_first_key(segment_BS)[:, None, :, None], (B, G, S, H // G))
    o_NQA = _core(scale, heads_first(q_BSHA), heads_first(k_BSGA), heads_first(v_BSGA), first_BGSr.reshape(B * G, -1))
    return jnp.swapaxes(o_NQA.reshape(B, G, S, -1), 1, 2).reshape(B, S, H, A)


def decode_attention(q_BqHA: Array, k_BSGA: Array, v_BSGA: Array, mask_BqS: Array, *, scale: float) -> Array:
    """o_BqHA of a few queries against a cache of keys and values, where `mask_BqS` says which a query may see.

    A query that may see nothing gives zero.
    """
    B, q, H, A = q_BqHA.shape
    wide = wide_dtype(q_BqHA.dtype)
    q_BqGrA = q_BqHA.reshape(B, q, k_BSGA.shape[2], -1, A)
    score_BGrqS = jnp.einsum("BqGrA,BSGA->BGrqS", q_BqGrA, k_BSGA, preferred_element_type=wide) * scale
    seen_BGrqS = mask_BqS[:, None, None]
    weight_BGrqS = jnp.where(seen_BGrqS, jax.nn.softmax(jnp.where(seen_BGrqS, score_BGrqS, MASKED)), 0)
    o_BqGrA = jnp.einsum("BGrqS,BSGA->BqGrA", weight_BGrqS.astype(v_BSGA.dtype), v_BSGA, preferred_element_type=wide)
    return o_BqGrA.reshape(B, q, H, A).astype(q_BqHA.dtype)


def _first_key(segment_BS: Array) -> Array:
    """Index of the first token of each token's segment; S, which no key has, for padding."""
    S = segment_BS.shape[1]
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    changes_BS = segment_BS != jnp.roll(segment_BS, 1, axis=1)
    first_BS = lax.cummax(jnp.where(changes_BS, index_1S, 0), axis=1)
    return jnp.where(segment_BS > 0, first_BS, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(scale: float, q_NQA: Array, k_NSA: Array, v_NSA: Array, first_NQ: Array) -> Array:
    return _forward(scale, q_NQA, k_NSA, v_NSA, first_NQ)[0]


def _forward(scale: float, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    o_NQA, log_sum_NQ = _by_platform(functools.partial(_forward_blocks, scale), *inputs)
    return o_NQA, (*inputs, o_NQA, log_sum_NQ)


def _backward(scale: float, residue: tuple[Array, ...], do_NQA: Array) -> tuple[Array | None, ...]:
    return *_by_platform(functools.partial(_backward_blocks, scale), *residue, do_NQA), None


_core.defvjp(_forward, _backward)


def _by_platform(run: Any, *args: Array) -> Any:
    """The one switch: `run(num_blocks, *args)`, in blocks and groups of heads where compiled for a CPU, else at once."""
    N, Q, _ = args[0].shape
    S = args[1].shape[1]
    num_blocks = 8 if S >= 1024 else max(1, min(4, S // 64))
    fitting = max(4, SCORES // (Q * S))
    group = max(n for n in range(1, N + 1) if N % n == 0 and n <= fitting)

    def in_groups(*args):
        if group == N:
            return run(num_blocks, *args)
        split = lambda z: z.reshape(N // group, group, *z.shape[1:])
        join = lambda z: z.reshape(N, *z.shape[2:])
        return jax.tree.map(join, lax.map(lambda one: run(num_blocks, *one), jax.tree.map(split, args)))

    return lax.platform_dependent(*args, cpu=in_groups, default=functools.partial(run, 1))


def _blocks(num_blocks: int, Q: int, S: int) -> list[tuple[slice, int]]:
    """(queries, number of keys they may see at most) of each block; any S will do, blocks need not be equal."""
    r = Q // S
    edges = [S * i // num_blocks for i in range(num_blocks + 1)]
    return [(slice(start * r, stop * r), stop) for start, stop in itertools.pairwise(edges)]


def _dot(spec: str, a: Array, b: Array) -> Array:
    """An einsum in the dtype of b, added up in a wide one."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide_dtype(b.dtype))


def _token(queries: slice, r: int) -> Array:
    return jnp.arange(queries.start, queries.stop, dtype=jnp.int32) // r


def _forward_blocks(
    scale: float, num_blocks: int, q_NQA: Array, k_NSA: Array, v_NSA: Array, first_NQ: Array
) -> tuple[Array, Array]:
    """(o_NQA, log_sum_NQ): the output and the log of the softmax's denominator."""
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    outputs, log_sums = [], []
    for queries, K in _blocks(num_blocks, Q, S):
        key_1K = jnp.arange(K, dtype=jnp.int32)[None, None]
        seen_NQK = (key_1K >= first_NQ[:, queries, None]) & (key_1K <= _token(queries, Q // S)[None, :, None])
        score_NQK = _dot("NQA,NKA->NQK", q_NQA[:, queries], k_NSA[:, :K]) * scale
        score_NQK = jnp.where(seen_NQK, score_NQK, MASKED)
        # never as low as MASKED, so that a query which sees nothing has weights of zero, and not of one
        top_NQ1 = jnp.maximum(jnp.max(score_NQK, axis=-1, keepdims=True), MASKED / 2)
        weight_NQK = jnp.exp(score_NQK - top_NQ1)
        sum_NQ1 = jnp.sum(weight_NQK, axis=-1, keepdims=True)
        sum_NQ1 = jnp.where(sum_NQ1 > 0, sum_NQ1, 1)
        outputs.append((_dot("NQK,NKA->NQA", weight_NQK, v_NSA[:, :K]) / sum_NQ1).astype(q_NQA.dtype))
        log_sums.append((top_NQ1 + jnp.log(sum_NQ1))[..., 0])
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(log_sums, axis=1)


def _backward_blocks(
    scale: float,
    num_blocks: int,
    q_NQA: Array,
    k_NSA: Array,
    v_NSA: Array,
    first_NQ: Array,
    o_NQA: Array,
    log_sum_NQ: Array,
    do_NQA: Array,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv). Scores lie keys first here: then only one of the five products needs a transposed operand."""
    Q, S = q_NQA.shape[1], k_NSA.shape[1]
    wide = wide_dtype(q_NQA.dtype)
    shift_NQ = jnp.sum(o_NQA.astype(wide) * do_NQA.astype(wide), axis=-1)
    dqs = []
    dk_NSA, dv_NSA = jnp.zeros_like(k_NSA, dtype=wide), jnp.zeros_like(v_NSA, dtype=wide)
    for queries, K in _blocks(num_blocks, Q, S):
        q, do, k_NKA, v_NKA = q_NQA[:, queries], do_NQA[:, queries], k_NSA[:, :K], v_NSA[:, :K]
        key_K1 = jnp.arange(K, dtype=jnp.int32)[None, :, None]
        seen_NKQ = (key_K1 >= first_NQ[:, None, queries]) & (key_K1 <= _token(queries, Q // S)[None, None])
        score_NKQ = _dot("NKA,NQA->NKQ", k_NKA, q) * scale
        weight_NKQ = jnp.where(seen_NKQ, jnp.exp(score_NKQ - log_sum_NQ[:, None, queries]), 0)
        dscore_NKQ = weight_NKQ * (_dot("NKA,NQA->NKQ", v_NKA, do) - shift_NQ[:, None, queries])
        dqs.append(_dot("NKQ,NKA->NQA", dscore_NKQ, k_NKA) * scale)
        dk_NSA = dk_NSA.at[:, :K].add(_dot("NKQ,NQA->NKA", dscore_NKQ, q) * scale)
        dv_NSA = dv_NSA.at[:, :K].add(_dot("NKQ,NQA->NKA", weight_NKQ, do))
    dq_NQA = jnp.concatenate(dqs, axis=1)
    return dq_NQA.astype(q_NQA.dtype), dk_NSA.astype(k_NSA.dtype), dv_NSA.astype(v_NSA.dtype)
