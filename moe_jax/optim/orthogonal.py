"""The orthogonalisation of Muon for sharded stacks of matrices.

optax.contrib.muon computes the same (a test compares them), but it merges layers and experts into
one dimension and multiplies sharded matrices, which an Explicit mesh refuses. Here the mesh axes
that split a matrix first move to its batch dimensions (layers, experts) where those divide: every
device then orthogonalises whole matrices of its own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.names import name_of

# The roles of the last dimensions of a weight, by the last part of its name: i(nput), o(utput),
# b(atch). All dimensions before are batch.
MATRICES = {"q": "ioo", "k": "ioo", "v": "ioo", "o": "iio", "w_in": "ibo", "w_out": "io"}
# Of latent attention.
MATRICES |= {"q_a": "io", "q_b": "ioo", "kv_a": "io", "kv_b": "ioo"}
# Of multi-token prediction: one matrix of 2 D rows.
MATRICES |= {"w_join": "iio"}


def orthogonalize(steps: int) -> optax.GradientTransformation:
    """Replaces every matrix U S V' of the updates by about U V', times 0.2 sqrt(max(rows,
    columns)). Keeps no state.
    """

    def one(path: Any, x: jax.Array) -> jax.Array:
        roles = MATRICES[name_of(path).rpartition("/")[2]]
        # Every dimension before those of the table is batch.
        return _orthogonal(x, ("b" * x.ndim + roles)[-x.ndim :], steps)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates))


# Jitted, so that weights of one shape are traced and lowered once.
@functools.partial(jax.jit, static_argnames="steps")
def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """Returns about U V' of every matrix U S V' in x [..., rows, columns].

    The singular values end between 0.7 and 1.2. It is the quintic iteration with the coefficients
    of Jordan (https://kellerjordan.github.io/posts/muon).
    """
    # The Gram matrix is of the shorter side.
    is_wide = x.shape[-2] <= x.shape[-1]
    x = x if is_wide else x.mT
    # The iteration converges for singular values up to 1, and this norm bounds the largest.
    norm = jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True))
    x = x / (norm + 1e-8)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x if is_wide else x.mT


def _orthogonal(x: jax.Array, roles: str, steps: int) -> jax.Array:
    """Returns the orthogonalised matrices of one weight; `roles` has a letter per dimension."""
    # [batch, input, output], which make one stack of matrices.
    order = [dim for role in "bio" for dim in range(x.ndim) if roles[dim] == role]
    num_batch, num_input = roles.count("b"), roles.count("i")
    y = x.transpose(order)
    shape = y.shape
    # Several dimensions may be one side: o, [H, A, D], is a matrix of H A rows and D columns.
    rows = math.prod(shape[num_batch : num_batch + num_input])
    columns = math.prod(shape[num_batch + num_input :])

    shardings = _to_whole_matrices(y, num_batch)
    for sharding in shardings[1:]:
        y = jax.sharding.reshard(y, sharding)
    matrices = y.reshape((*shape[:num_batch], rows, columns))
    # The update then has the size of Adam's (Liu et al. 2025).
    scale = 0.2 * max(rows, columns) ** 0.5
    y = (scale * newton_schulz(matrices, steps)).reshape(shape)
    # Back by the same steps.
    for sharding in shardings[-2::-1]:
        y = jax.sharding.reshard(y, sharding)
    return y.transpose([order.index(dim) for dim in range(x.ndim)])


def _to_whole_matrices(x: jax.Array, num_batch: int) -> list[NamedSharding]:
    """Returns shardings from that of x to one that splits no matrix.

    Axes move to batch dimensions that they divide, or go.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if mesh.empty:
        return []
    shardings = [sharding]
    axes = [_axes(entry) for entry in sharding.spec]
    axes += [()] * (x.ndim - len(axes))
    # One axis at a time, the minor one of a dimension first: each move is then a plain all-to-all
    # (or all-gather). Taken in one leap, the compiler finds no way and gathers everything first.
    for dim in range(num_batch, x.ndim):
        while axes[dim]:
            *rest, axis = axes[dim]
            axes[dim] = tuple(rest)
            for batch_dim in range(num_batch):
                moved = (*axes[batch_dim], axis)
                if x.shape[batch_dim] % math.prod(mesh.shape[name] for name in moved) == 0:
                    axes[batch_dim] = moved
                    break
            # An axis that no batch dimension takes is gone: matrices are gathered over it.
            shardings.append(NamedSharding(mesh, P(*axes)))
    return shardings


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a partition."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
