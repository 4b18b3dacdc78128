"""The product of the gradient of a weight, a^T @ b: the sum over the rows of two arrays.

Shapes: N anything that both have, R rows, X and Y columns.
"""

from typing import Any

from jax import Array, lax

from moe_jax.parallel.compiling import platform


def outer(a_NRX: Array, b_NRY: Array, dtype: Any) -> Array:
    """Returns a^T @ b [*N, X, Y], added up in `dtype`; N may be nothing.

    On a CPU the rows are two dimensions, where their number is even. XLA's compiler then transposes
    `a` first and takes its fast product. A single dimension it leaves to another product, which is
    1.5 times as slow for matrices, and up to four times for many small ones.
    """
    *common, num_rows, _ = a_NRX.shape
    first = len(common)
    if platform() == "cpu" and num_rows % 2 == 0:
        halves = (*common, 2, num_rows // 2)
        a_NRX = a_NRX.reshape(*halves, a_NRX.shape[-1])
        b_NRY = b_NRY.reshape(*halves, b_NRY.shape[-1])
    rows = tuple(range(first, a_NRX.ndim - 1))
    both = tuple(range(first))
    return lax.dot_general(a_NRX, b_NRY, ((rows, rows), (both, both)), preferred_element_type=dtype)
