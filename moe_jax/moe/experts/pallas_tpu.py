"""The experts' kernel for TPUs, in Pallas: grouped products by a list of visits.

A visit is a tile of rows and one expert that has rows in it. The list is read by the kernel before
the tiles are (scalar prefetch), and its length is known at run time, so an expert costs as many
visits as its rows touch tiles. This is the idea of MegaBlocks (Gale et al. 2022, arXiv:2211.15841)
as Megablox has it for TPUs; here groups may have gaps between them, and the types say over which
mesh axes a result varies, so that it stands inside a `shard_map` with `check_vma=True`.

Off a TPU it can be interpreted, for tests, but not inside a `shard_map` that checks what varies.

Shapes: see network.py; X, Y either width of a weight, V visits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.moe.experts.narrow import is_narrow, sums_dtype
from moe_jax.moe.experts.network import KernelSizes, Layout
from moe_jax.moe.experts.whole import Products, products_of
from moe_jax.precision import wide_dtype

# A tile of rows is a quarter of the mean number of an expert's rows, between these.
FEWEST_ROWS, MOST_ROWS = 128, 256
# Columns of a tile, of which the largest that divides a width is taken.
COLUMNS = (512, 384, 256, 128)


class Visits(NamedTuple):
    """The list: visit v is of tile `tile_V[v]`, whose rows [first, end) are of its expert."""

    expert_V: Array
    tile_V: Array
    first_V: Array
    end_V: Array


def products(layout: Layout, block: tuple[int, int], interpret: bool = False) -> Products:
    """Returns the products of the kernel; `block` is that of `expert_ffn`."""

    return products_of(_product, _outer, layout, block, interpret)


def tile_rows(block: tuple[int, int], num_rows: int) -> int:
    """Returns the rows of a tile; the larger block is near the mean load of an expert."""
    rows = min(max(block[0] // 4, FEWEST_ROWS), MOST_ROWS)
    # A buffer of fewer rows is one tile.
    return rows if num_rows > rows else num_rows


def padded_rows(sizes: KernelSizes) -> int:
    """Returns the rows that experts of random loads cost beyond their own, on average.

    n rows that begin at any multiple of s touch n / B + 1 - s / 2 B tiles of B rows. The first
    expert begins with a tile, which is half a tile less.
    """
    B = tile_rows(sizes.block, sizes.num_rows)
    return sizes.num_experts * (B - sizes.block[1] // 2) - B // 2


def list_visits(layout: Layout, num_rows: int, rows: int, empty: bool) -> tuple[Visits, Array]:
    """Returns the visits of tiles of `rows` rows in order of experts, and their number.

    `empty`: an expert without rows is visited too, so that its result is written.
    """
    start_e, size_e = layout
    num_experts, num_tiles = size_e.shape[0], -(-num_rows // rows)
    end_e = start_e + size_e
    # An expert that has no rows may begin behind the last tile.
    first_tile_e = jnp.minimum(start_e // rows, num_tiles - 1)
    # From the tile of its first row to that of its last one.
    touched_e = (end_e - 1) // rows - start_e // rows + 1
    count_e = jnp.where(size_e > 0, touched_e, int(empty))
    # The visits of an expert are numbered [until - count, until).
    until_e = jnp.cumsum(count_e, dtype=count_e.dtype)
    # Every tile is visited once, and once more for each expert that begins within it.
    visit_V = jnp.arange(num_tiles + num_experts, dtype=size_e.dtype)
    # An expert whose visits have all passed by then: their number is that of the expert itself.
    is_before_Ve = until_e[None] <= visit_V[:, None]
    expert_V = jnp.minimum(is_before_Ve.sum(1, dtype=size_e.dtype), num_experts - 1)
    tile_V = first_tile_e[expert_V] + visit_V - (until_e - count_e)[expert_V]
    visits = Visits(expert_V, tile_V, start_e[expert_V], end_e[expert_V])
    return visits, until_e[-1]


def _columns(width: int) -> int:
    """Returns the columns of a tile: all of a width that no tile divides."""
    return next((tile for tile in COLUMNS if width % tile == 0), width)


def _is_own(visits: Visits, v: Array, shape: tuple[int, int]) -> Array:
    """Returns which rows of the tile of visit v are its expert's, as many columns wide as asked."""
    row = visits.tile_V[v] * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= visits.first_V[v]) & (row < visits.end_V[v])


def _product(
    a_RX: Array,
    w_eXY: Array,
    transposed: bool,
    layout: Layout,
    block: tuple[int, int],
    interpret: bool,
) -> Array:
    """Returns a @ w, or a @ w^T, of every expert's rows."""
    num_rows, width = a_RX.shape
    out_width = w_eXY.shape[1 if transposed else 2]
    rows, columns, out_columns = tile_rows(block, num_rows), _columns(width), _columns(out_width)
    visits, num_visits = list_visits(layout, num_rows, rows, empty=False)
    num_steps = width // columns

    def kernel(*refs):
        *of_visits, a_ref, w_ref, y_ref, sum_ref = refs
        v, step = pl.program_id(1), pl.program_id(2)

        # The sum runs over tiles of X, the innermost loop.
        @pl.when(step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        dims = ((1,), (1 if transposed else 0,)), ((), ())
        sum_ref[...] += lax.dot_general(
            a_ref[...], w_ref[...], dims, preferred_element_type=sum_ref.dtype
        )

        @pl.when(step == num_steps - 1)
        def _():
            # The other rows of the tile are those of visits before and after this one.
            is_own = _is_own(Visits(*of_visits), v, (rows, out_columns))
            kept = y_ref[...].astype(sum_ref.dtype)
            y_ref[...] = jnp.where(is_own, sum_ref[...], kept).astype(y_ref.dtype)

    def a_index(n, v, step, *of_visits):
        return Visits(*of_visits).tile_V[v], step

    def w_index(n, v, step, *of_visits):
        expert = Visits(*of_visits).expert_V[v]
        # w^T is never made: its tiles are read the other way round.
        return (expert, n, step) if transposed else (expert, step, n)

    def y_index(n, v, step, *of_visits):
        return Visits(*of_visits).tile_V[v], n

    w_tile = (out_columns, columns) if transposed else (columns, out_columns)
    return _call(
        kernel,
        visits,
        (a_RX, w_eXY),
        grid=(out_width // out_columns, num_visits, num_steps),
        in_specs=(((rows, columns), a_index), ((None, *w_tile), w_index)),
        out_spec=((rows, out_columns), y_index),
        out_shape=(num_rows, out_width),
        # Of narrow numbers the sums, which get their scales afterwards.
        out_dtype=sums_dtype(a_RX.dtype) if is_narrow(a_RX.dtype) else a_RX.dtype,
        widths=(width, out_width),
        interpret=interpret,
    )


def _outer(
    a_RX: Array, b_RY: Array, layout: Layout, block: tuple[int, int], interpret: bool
) -> Array:
    """Returns a^T @ b of every expert's rows [e, X, Y]."""
    (num_rows, width), out_width = a_RX.shape, b_RY.shape[1]
    num_experts = layout.size_e.shape[0]
    rows, columns, out_columns = tile_rows(block, num_rows), _columns(width), _columns(out_width)
    visits, num_visits = list_visits(layout, num_rows, rows, empty=True)

    def kernel(*refs):
        *of_visits, a_ref, b_ref, y_ref, sum_ref = refs
        v, last = pl.program_id(2), pl.num_programs(2) - 1
        expert_V = Visits(*of_visits).expert_V
        # The sum is over the visits of one expert, which follow each other.
        before, after = expert_V[jnp.maximum(v - 1, 0)], expert_V[jnp.minimum(v + 1, last)]

        @pl.when((v == 0) | (before != expert_V[v]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def own(ref):
            is_own = _is_own(Visits(*of_visits), v, ref.shape)
            # A TPU selects in 32 bits.
            return jnp.where(is_own, ref[...].astype(sum_ref.dtype), 0).astype(ref.dtype)

        # Both: what lies behind the last row may be no number.
        dims = ((0,), (0,)), ((), ())
        sum_ref[...] += lax.dot_general(
            own(a_ref), own(b_ref), dims, preferred_element_type=sum_ref.dtype
        )

        @pl.when((v == last) | (after != expert_V[v]))
        def _():
            y_ref[...] = sum_ref[...]

    def a_index(n, m, v, *of_visits):
        return Visits(*of_visits).tile_V[v], m

    def b_index(n, m, v, *of_visits):
        return Visits(*of_visits).tile_V[v], n

    def y_index(n, m, v, *of_visits):
        return Visits(*of_visits).expert_V[v], m, n

    return _call(
        kernel,
        visits,
        (a_RX, b_RY),
        grid=(out_width // out_columns, width // columns, num_visits),
        in_specs=(((rows, columns), a_index), ((rows, out_columns), b_index)),
        out_spec=((None, columns, out_columns), y_index),
        out_shape=(num_experts, width, out_width),
        out_dtype=wide_dtype(a_RX.dtype),
        widths=(width, out_width),
        interpret=interpret,
    )


def _call(
    kernel: Callable[..., None],
    visits: Visits,
    operands: Sequence[Array],
    *,
    grid: Any,
    in_specs: Any,
    out_spec: Any,
    out_shape: tuple[int, ...],
    out_dtype: Any,
    widths: tuple[int, int],
    interpret: bool,
) -> Array:
    """Runs a kernel on the visits; its sum has the last two dimensions of the output's tile.

    `widths` are those of a weight, X and Y.
    """
    varying = jax.typeof(operands[0]).manual_axis_type
    num_bytes = sum(z.size * z.dtype.itemsize for z in operands)
    run = pl.pallas_call(
        kernel,
        # For the compiler's schedule: the visits are known at run time only, so all rows count.
        cost_estimate=pl.CostEstimate(
            flops=2 * operands[0].shape[0] * math.prod(widths),
            bytes_accessed=num_bytes + math.prod(out_shape) * jnp.dtype(out_dtype).itemsize,
            transcendentals=0,
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, out_dtype, manual_axis_type=varying),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=grid,
            in_specs=[pl.BlockSpec(*spec) for spec in in_specs],
            out_specs=pl.BlockSpec(*out_spec),
            scratch_shapes=[pltpu.VMEM(out_spec[0][-2:], sums_dtype(operands[0].dtype))],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
    )
    return run(*visits, *operands)
