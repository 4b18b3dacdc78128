"""Attention on a CPU works on some rows and heads at a time, whose scores stay in the cache.

B rows, G key heads, H query heads, T tokens, Q = T * H / G queries of a key head, A head width.
"""

from typing import Any, NamedTuple

import jax
from jax import Array, lax

from moe_jax.parallel.zeros import own_zeros

# Scores of a group of heads on a CPU, 4 MB, of which a block has a quarter at a time: at S = 256
# and width 32, 16 heads were the fastest of 4, 8, 16 and 32.
SCORES = 2**20
# Which dimension of an array has heads, by the number of its dimensions: [B, T, H, A], [B, G, Q].
# Those of [B, T] have none.
HEAD_AXIS = {4: 2, 3: 1}


class Part(NamedTuple):
    """Holds how many rows and key heads are worked on at once.

    Parts are cut out of the arrays as they are, [B, T, H, A], and brought into another order while
    they are small: the same of whole arrays took a quarter of the time of attention.
    """

    rows: int
    heads: int
    # G of the whole arrays.
    all_heads: int

    def run_all(self, run: Any, near: Array, args: Any) -> Any:
        """Returns the results of `run(*args)`, put together from those of all parts."""
        num_rows, head_parts = args[0].shape[0], self.all_heads // self.heads

        def step(i, results):
            row, head = i // head_parts * self.rows, i % head_parts * self.heads
            some = run(*jax.tree.map(lambda z: self._cut(z, row, head), args))

            def put(z, new):
                starts, _ = self._window(z, row, head)
                return lax.dynamic_update_slice(z, new, starts)

            return jax.tree.map(put, results, some)

        first = jax.eval_shape(lambda args: jax.tree.map(lambda z: self._cut(z, 0, 0), args), args)
        some, structure = jax.tree.flatten(jax.eval_shape(run, *first))
        zeros = []
        for number, z in enumerate(some):
            shape = [num_rows, *z.shape[1:]]
            axis = HEAD_AXIS[z.ndim]
            shape[axis] *= head_parts
            zeros.append(own_zeros(near, tuple(shape), z.dtype, number))
        num_parts = num_rows // self.rows * head_parts
        return lax.fori_loop(0, num_parts, step, jax.tree.unflatten(structure, zeros))

    def _cut(self, z: Array, row: Any, head: Any) -> Array:
        return lax.dynamic_slice(z, *self._window(z, row, head))

    def _window(self, z: Any, row: Any, head: Any) -> tuple[list[Any], list[int]]:
        """Returns where a part begins in an array, and its shape."""
        starts, sizes = [row] + [0] * (z.ndim - 1), [self.rows, *z.shape[1:]]
        if axis := HEAD_AXIS.get(z.ndim):
            # Query heads are r to a key head.
            each = z.shape[axis] // self.all_heads
            starts[axis], sizes[axis] = head * each, self.heads * each
        return starts, sizes


def part_that_fits(num_rows: int, num_heads: int, scores: int) -> Part:
    """Returns as many rows and key heads as fit: all heads of some rows, or some of one row.

    `scores` of one key head.
    """
    fitting = max(4, SCORES // scores)
    rows = _largest_divisor(num_rows, fitting // num_heads)
    return Part(rows, _largest_divisor(num_heads, fitting), num_heads)


def _largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number up to a limit, at least 1."""
    return max(n for n in range(1, max(1, min(number, limit)) + 1) if number % n == 0)
