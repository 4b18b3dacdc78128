"""How many blocks of each size the experts' kernel for CPUs takes for the rows of an expert."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.experts import blocks
from moe_jax.moe.experts.blocks import block_sizes


def cost_of_cover(rows, counts, sizes):
    """What blocks cost in rows; infinite if they do not cover."""
    covered = sum(num * size for num, size in zip(counts, sizes, strict=True))
    cost = covered + blocks.BLOCK_COST * sum(counts)
    return cost if covered >= rows else math.inf


@pytest.mark.parametrize("mean", [8, 64, 512])
def test_blocks_cover_all_rows_at_the_least_cost(mean):
    """Against every choice of up to nine blocks of each size."""
    sizes = blocks.cover_sizes(block_sizes(mean), num_rows=100 * mean)
    size_e = jnp.asarray([*range(0, 3 * mean, max(mean // 16, 1)), 40 * mean], jnp.int32)
    chosen_eS = np.asarray(jax.jit(blocks.num_blocks, static_argnums=0)(sizes, size_e))
    assert not chosen_eS[0].any()
    every = list(itertools.product(range(10), repeat=len(sizes)))
    for rows, chosen in zip(np.asarray(size_e)[1:-1], chosen_eS[1:-1], strict=True):
        least = min(cost_of_cover(rows, counts, sizes) for counts in every)
        assert cost_of_cover(rows, chosen, sizes) == least
    # All tokens on one expert: blocks of the largest size, but for the last few.
    assert math.isfinite(cost_of_cover(40 * mean, chosen_eS[-1], sizes))
    assert chosen_eS[-1, 0] >= 40 * mean // sizes[0] - 4


def test_blocks_of_a_hand_worked_case():
    sizes = blocks.cover_sizes(block_sizes(64), num_rows=4096)
    assert sizes == (112, 80, 64)
    size_e = jnp.asarray([1, 64, 65, 81, 113, 128, 176], jnp.int32)
    # 113 rows: 64 + 64 and two costs, 228, are less than 112 + 64. 176: 112 + 64.
    assert blocks.num_blocks(sizes, size_e).tolist() == [
        [0, 0, 1],
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
        [0, 0, 2],
        [0, 0, 2],
        [1, 0, 1],
    ]
    # None is larger than the buffer.
    assert blocks.cover_sizes(block_sizes(64), num_rows=48) == (48,)
