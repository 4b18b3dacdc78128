"""A layer's tokens in chunks, each with an exchange and experts of its own, so that the tokens of
one chunk can travel while the experts of another compute: adaptive pipelining of Tutel (Hwang et
al. 2022, arXiv:2206.03382), and the two micro-batches of DeepSeek-V3 (arXiv:2412.19437, section
3.4.1).

A chunk is whole groups, so capacity and order are those of the layer; of a dispatcher that never
drops it is any tokens, because no token matters to another. The chunks are written one after
another, not as a loop, and none needs what another made: what runs beside what is the compiler's
choice.

Shapes: T tokens, N assignments, G groups, K choices of a token.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.contract import Dispatcher, Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.routing.contract import Routing, Slots


def number_of(
    dispatcher: Dispatcher, num_tokens: int, group_tokens: int, expert_axis: int, wanted: int
) -> int:
    """Returns the largest number of chunks that divides `wanted` and the tokens of a device, or
    their groups where these matter; 1 where nothing travels.
    """
    if expert_axis == 1:
        return 1
    # Tokens of a group compete for places, or are mixed with each other.
    grouped = dispatcher.drops or dispatcher.mixes
    return math.gcd(wanted, num_tokens // (group_tokens if grouped else 1))


def dispatched(
    dispatcher: Dispatcher,
    x_TD: jax.Array,
    routing: Routing | Slots,
    experts: Experts,
    *,
    shape: Shape,
    options: Any,
    num_chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns what the dispatcher's `apply` returns (contract.py), of all chunks together."""
    sizes = (shape.num_tokens, shape.group_tokens, shape.expert_axis)
    num_chunks = number_of(dispatcher, *sizes, num_chunks)
    if num_chunks == 1:
        return dispatcher.apply(x_TD, routing, experts, shape=shape, options=options)
    parts = list(_slots(routing, num_chunks) if isinstance(routing, Slots) else ())
    if isinstance(routing, Routing):
        parts = list(_routings(routing, shape, num_chunks))
    part_shape = _of_chunk(shape, parts[0], num_chunks)
    # One after another, and none needs what another made: the compiler may run them side by side.
    results = []
    for part_TD, part in zip(jnp.split(x_TD, num_chunks), parts, strict=True):
        results.append(dispatcher.apply(part_TD, part, experts, shape=part_shape, options=options))
    y_TD = jnp.concatenate([y_TD for y_TD, _ in results])
    dropped = [dropped_N for _, dropped_N in results]
    if isinstance(routing, Routing) and not routing.per_token:
        # Every chunk has the whole list, in which the assignments of others are nowhere.
        return y_TD, jnp.stack(dropped).any(0)
    return y_TD, jnp.concatenate(dropped)


def _of_chunk(shape: Shape, part: Routing | Slots, num_chunks: int) -> Shape:
    """Returns the sizes of one chunk; all chunks have the same."""
    if isinstance(part, Slots):
        num_assignments = shape.num_assignments // num_chunks
    else:
        num_assignments = part.expert_index_N.shape[0]
    return shape._replace(
        num_tokens=shape.num_tokens // num_chunks,
        num_assignments=num_assignments,
        # Not rounded: capacity is computed of it.
        num_intended=shape.num_intended / num_chunks,
        group_tokens=min(shape.group_tokens, shape.num_tokens // num_chunks),
    )


def _slots(slots: Slots, num_chunks: int) -> Iterator[Slots]:
    """Yields the slots of each chunk, which are those of its groups."""
    dispatch = jnp.split(slots.dispatch_GtEp, num_chunks)
    combine = jnp.split(slots.combine_GtEp, num_chunks)
    for dispatch_GtEp, combine_GtEp in zip(dispatch, combine, strict=True):
        yield slots._replace(dispatch_GtEp=dispatch_GtEp, combine_GtEp=combine_GtEp)


def _routings(routing: Routing, shape: Shape, num_chunks: int) -> Iterator[Routing]:
    """Yields the assignments of each chunk, whose tokens are numbered from 0."""
    num_tokens = shape.num_tokens // num_chunks
    num_assignments = routing.expert_index_N.shape[0] // num_chunks
    for chunk in range(num_chunks):
        token_N = routing.token_N - chunk * num_tokens
        if routing.per_token:
            # The list is in the order of tokens, K entries each.
            own = slice(chunk * num_assignments, (chunk + 1) * num_assignments)
            order_N = routing.order_N
            if order_N is not None:
                # Where each entry stands in the order of priority, and of a chunk's the order.
                place_N = jnp.argsort(order_N).astype(order_N.dtype)
                order_N = jnp.argsort(place_N[own]).astype(order_N.dtype)
            yield routing._replace(
                token_N=token_N[own],
                expert_index_N=routing.expert_index_N[own],
                gate_N=routing.gate_N[own],
                order_N=order_N,
            )
        else:
            # Any order, and any number of each chunk: the whole list, others go nowhere.
            is_own_N = (token_N >= 0) & (token_N < num_tokens)
            nowhere = shape.num_experts
            yield routing._replace(
                token_N=jnp.where(is_own_N, token_N, 0),
                expert_index_N=jnp.where(is_own_N, routing.expert_index_N, nowhere),
                gate_N=jnp.where(is_own_N, routing.gate_N, 0),
            )
