"""The orthogonalisation of Muon for sharded stacks of matrices.

optax.contrib.muon computes the same (a test compares them), but it merges layers and experts into
one dimension and multiplies sharded matrices, which an Explicit mesh refuses. Here the mesh axes
that split a matrix first move to its batch dimensions (layers, experts) where those divide: every
device then orthogonalises whole matrices of its own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.names import name_of

# The last dimensions of a weight, by the last part of its name: i(nput), o(utput), b(atch); all
# before are batch.
MATRICES = {"q": "ioo", "k": "ioo", "v": "ioo", "o": "iio", "w_in": "ibo", "w_out": "io"}


def orthogonalize(steps: int) -> optax.GradientTransformation:
    """Replaces every matrix U S V' of the updates by about U V', times 0.2 sqrt(max(rows,
    columns)). Keeps no state.
    """

    def one(path: Any, x: jax.Array) -> jax.Array:
        roles = MATRICES[name_of(path).rpartition("/")[2]]
        return _orthogonal(x, ("b" * x.ndim + roles)[-x.ndim :], steps)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates))


def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """About U V' of every matrix U S V' in x [..., rows, columns]: the singular values end between
    0.7 and 1.2.

    The quintic iteration with the coefficients of Jordan
    (https://kellerjordan.github.io/posts/muon).
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # so that the Gram matrix is of the shorter side
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True)) + 1e-8)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x if wide else x.mT


def _orthogonal(x: jax.Array, roles: str, steps: int) -> jax.Array:
    order = [d for role in "bio" for d in range(x.ndim) if roles[d] == role]
    num_batch, num_input = roles.count("b"), roles.count("i")
    y = x.transpose(order)
    shape, places = y.shape, _to_whole_matrices(y, num_batch)
    for place in places[1:]:
        y = jax.sharding.reshard(y, place)
    rows, columns = (
        math.prod(shape[num_batch : num_batch + num_input]),
        math.prod(shape[num_batch + num_input :]),
    )
    y = (
        0.2
        * max(rows, columns) ** 0.5
        * newton_schulz(y.reshape((*shape[:num_batch], rows, columns)), steps)
    )
    y = y.reshape(shape)
    for place in places[-2::-1]:
        y = jax.sharding.reshard(y, place)
    return y.transpose([order.index(d) for d in range(x.ndim)])


def _to_whole_matrices(x: jax.Array, num_batch: int) -> list[NamedSharding]:
    """Shardings from that of x to one that splits no matrix; axes move to batch dimensions that
    they divide, or go.

    One axis at a time, the minor one of a dimension first: each move is then a plain all-to-all (or
    all-gather). Taken in one leap, the compiler finds no way and gathers everything first.
    """
    place = jax.typeof(x).sharding
    if place.mesh.empty:
        return []
    places = [place]
    axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in place.spec]
    axes += [()] * (x.ndim - len(axes))
    for dim in range(num_batch, x.ndim):
        while axes[dim]:
            *rest, axis = axes[dim]
            axes[dim] = tuple(rest)
            for b in range(num_batch):
                if x.shape[b] % math.prod(place.mesh.shape[a] for a in (*axes[b], axis)) == 0:
                    axes[b] = (*axes[b], axis)
                    break
            places.append(NamedSharding(place.mesh, P(*axes)))
    return places
