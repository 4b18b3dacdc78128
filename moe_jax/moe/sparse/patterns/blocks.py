"""b x b blocks; balanced: as many for every column of blocks, so that products are one batch."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns.contract import (
    Groups,
    Matrices,
    Pattern,
    by_density,
    needs_matrices,
    reshaped,
    whole,
)
from moe_jax.schema.options import NUMBER, PART, option


@dataclasses.dataclass(frozen=True)
class Options:
    density: float = option(
        0.25, "fraction of the blocks of each expert's matrices that are not zero", PART
    )
    block: int = option(16, "a block is block x block weights", NUMBER)
    balanced: bool = option(True, "as many blocks for every block of outputs")


def pool(experts: Matrices, options: Options) -> Groups:
    """Returns the sums of blocks."""
    return {name: _blocks(whole(x), options.block) for name, x in experts.items()}


def _blocks(x: jax.Array, b: int) -> jax.Array:
    """Returns the sums of b x b blocks of [E, I, ..., O], as [E, Q, O / b, I / b].

    Q numbers what lies between I and O (gate and up).
    """
    num_experts, num_inputs, num_outputs = x.shape[0], x.shape[1], x.shape[-1]
    num_between = x.size // (num_experts * num_inputs * num_outputs)
    split = (num_experts, num_inputs // b, b, num_between, num_outputs // b, b)
    sums = reshaped(x, *split).sum((2, 5))
    # [E, I / b, Q, O / b] -> [E, Q, O / b, I / b]: the last dimension is a column of blocks, which
    # is a row of its own where `balanced`.
    return sums.transpose(0, 2, 3, 1)


def spread(groups: Groups, experts: Matrices, options: Options) -> Matrices:
    """Returns the value of its block for every entry."""
    b = options.block

    def spread_one(group: jax.Array, x: jax.Array) -> jax.Array:
        # [E, I / b, Q, O / b].
        blocks = group.transpose(0, 3, 1, 2)
        num_experts, num_rows, num_between, num_columns = blocks.shape
        split = (num_experts, num_rows, b, num_between, num_columns, b)
        entries = jnp.broadcast_to(blocks[:, :, None, :, :, None], split)
        return reshaped(entries, *x.shape)

    return {name: spread_one(groups[name], x) for name, x in experts.items()}


def rows(options: Options) -> int:
    """Says whether every column of blocks is a row of its own."""
    return -1 if options.balanced else 1


def tile(options: Options) -> tuple[int, str]:
    """Says that a width must be made of whole blocks."""
    return options.block, "block"


PATTERN = Pattern(Options, pool, spread, rows, by_density, tile=tile, misfit=needs_matrices)
