"""The experts' kernel of XLA itself: `jax.lax.ragged_dot`.

What it costs depends on the compiler. On a CPU and a GPU every product takes E times the useful
work, on a TPU the gradient of the weights does (docs/accelerators.md). So no platform takes it by
itself.

Shapes: see network.py.
"""

import jax.numpy as jnp
from jax import Array, lax

from moe_jax.moe.experts.narrow import is_narrow, sums_dtype
from moe_jax.moe.experts.network import Layout
from moe_jax.moe.experts.whole import Products
from moe_jax.precision import wide_dtype

_OVER_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def products(layout: Layout, block: tuple[int, int]) -> Products:
    """Returns the products of `ragged_dot`."""
    del block
    start_e, size_e = layout
    # Groups of ragged_dot have no gaps: a gap goes to the expert before it. The end of the buffer
    # goes to nobody.
    last_end = start_e[-1:] + size_e[-1:]
    end_e = jnp.concatenate([start_e[1:], last_end])
    group_size_e = jnp.diff(end_e, prepend=jnp.zeros_like(end_e[:1]))

    def product(a_RX: Array, w_eXY: Array) -> Array:
        sums = sums_dtype(a_RX.dtype) if is_narrow(a_RX.dtype) else None
        return lax.ragged_dot(a_RX, w_eXY, group_size_e, preferred_element_type=sums)

    def transposed(b_RY: Array, w_eXY: Array) -> Array:
        return lax.ragged_dot(b_RY, w_eXY.mT, group_size_e)

    def outer(a_RX: Array, b_RY: Array) -> Array:
        wide = wide_dtype(a_RX.dtype)
        return lax.ragged_dot_general(
            a_RX, b_RY, group_size_e, _OVER_ROWS, preferred_element_type=wide
        )

    return Products(product, transposed, outer)
