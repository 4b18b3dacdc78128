"""What the experts' kernel for Hopper GPUs can compute, and in which sizes.

The kernel itself is pallas_hopper.py, which is imported where it is taken.

Shapes: see network.py; B rows of a tile.
"""

import re
from collections.abc import Callable

import jax.numpy as jnp

from moe_jax.moe.experts.network import Case, KernelSizes
from moe_jax.parallel.compiling import device_kind

# Names of GPUs that have WGMMA: it came with Hopper, and the next generation has other
# instructions in its place.
KINDS = re.compile(r"NVIDIA G?H(100|200|800|20)\b")
# Rows of a tile, of which the largest is taken that is not beyond a quarter of the mean load.
TILE_ROWS = (128, 64)
# Columns of a tile, of which the largest that divides a width is taken.
COLUMNS = (128, 64)
# Rows of a unit, of which the largest that divides the small block is taken. WGMMA adds up 16 rows
# of bfloat16 at a time.
UNITS = (64, 32, 16)


def serves(case: Case) -> bool:
    """Returns whether the kernel computes a case on the devices of the current mesh.

    Without a mesh nobody says which GPU is compiled for.
    """
    return (
        KINDS.match(device_kind() or "") is not None
        # WGMMA takes narrow numbers in one order of dimensions alone, and float32 rounded.
        and case.dtype == jnp.bfloat16
        and not case.is_narrow
        and all(width % COLUMNS[-1] == 0 for width in case.widths)
        and case.block[1] % UNITS[-1] == 0
        and case.num_rows >= TILE_ROWS[-1]
    )


def padded_rows(sizes: KernelSizes) -> int:
    """Returns the rows that experts of random loads cost beyond their own: on average half a tile
    each.
    """
    return sizes.num_experts * tile_rows(sizes.block, sizes.num_rows) // 2


def tile_rows(block: tuple[int, int], num_rows: int) -> int:
    """Returns B; the larger block is near the mean load of an expert."""
    most = min(max(block[0] // 4, TILE_ROWS[-1]), num_rows)
    return _largest(TILE_ROWS, lambda rows: rows <= most)


def columns(width: int) -> int:
    """Returns the columns of a tile."""
    return _largest(COLUMNS, lambda columns: width % columns == 0)


def unit_rows(block: tuple[int, int]) -> int:
    """Returns the rows of a unit, at a multiple of which every expert begins."""
    return _largest(UNITS, lambda unit: block[1] % unit == 0)


def _largest(choices: tuple[int, ...], fits: Callable[[int], bool]) -> int:
    """Returns the largest choice that fits; of a case that is served one does."""
    return next(choice for choice in choices if fits(choice))
