"""The experts' kernel for Hopper GPUs, in Pallas for Mosaic: grouped products over a list of tiles.

A tile is rows of one expert. The list is that of tiles.py, and it is made outside of the kernel,
which reads in it how many tiles there are. As many blocks as such a GPU has multiprocessors go
through the tiles times the columns of the result. Each fetches parts of both factors into its
shared memory (TMA), a few ahead of the one that it multiplies (WGMMA), and adds up in float32.

Nothing is masked. An expert begins at a multiple of the small block, and the room up to the next
multiple is its own. So rows of a result are stored in units that are an expert's alone, and a sum
over rows goes through whole units: where a row is nobody's, the second factor is zero (whole.py).

It asks no device while it is traced, so it is compiled for a GPU that is not there. Its types say
over which mesh axes a result varies, so that it stands inside a `shard_map` with `check_vma=True`.

Shapes: see network.py; X, Y either width of a weight, V tiles, B rows of a tile.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from moe_jax.moe.experts import hopper
from moe_jax.moe.experts.network import Layout
from moe_jax.moe.experts.tiles import list_tiles
from moe_jax.moe.experts.whole import Products, products_of
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype

# Multiprocessors of an H100 or H200: with more or fewer it is as right, and less even.
BLOCKS = 132
# Columns of the first factor that a part has: 128 bytes, the widest pattern of shared memory.
STEP = 64
# Parts that are in shared memory at a time: in tiles of 128 rows and columns they take 128 of its
# 227 KiB, and a result in float32 64 more.
STEPS_AHEAD = 4
# Tiles of columns that neighbouring blocks work on, so that they share rows and weights in the
# cache.
STRIP = 8


def products(layout: Layout, block: tuple[int, int], interpret: Any = None) -> Products:
    """Returns the products of the kernel; `block` is that of `expert_ffn`.

    `interpret`: how a CPU interprets it, for tests.
    """

    return products_of(_product, _outer, layout, block, interpret)


def _product(
    a_RX: Array,
    w_eXY: Array,
    transposed: bool,
    layout: Layout,
    block: tuple[int, int],
    interpret: Any,
) -> Array:
    """Returns a @ w, or a @ w^T, of every expert's rows."""
    num_rows, width = a_RX.shape
    out_width = w_eXY.shape[1 if transposed else 2]
    dtype = a_RX.dtype
    B, unit = hopper.tile_rows(block, num_rows), hopper.unit_rows(block)
    columns = hopper.columns(out_width)
    num_strips, strip_width = _strips(out_width // columns)
    tiles = list_tiles(layout, num_rows, B, per_round=1)
    last_offset = (num_rows - B) // unit

    def kernel(expert_ref, first_ref, end_ref, number_ref, a_ref, w_ref, y_ref):
        @gpu.nd_loop((num_strips, number_ref[0], strip_width), collective_axes="block")
        def _(loop):
            strip, v, place = loop.index
            n = strip * strip_width + place
            first, end = first_ref[v], end_ref[v]
            # The last rows of the buffer have no B rows behind them.
            offset = jnp.minimum(first, last_offset)

            def add_up(sum_ref):
                def step(_, a_part, w_part):
                    # w^T is never made: its parts are read the other way round.
                    gpu.wgmma(sum_ref, a_part, w_part.T if transposed else w_part)

                a_spec = _part((B, STEP), lambda k: (0, k), dtype, STEP)
                if transposed:
                    w_spec = _part((columns, STEP), lambda k: (n, k), dtype, STEP)
                else:
                    w_spec = _part((STEP, columns), lambda k: (k, n), dtype, STEP)
                multiply = _pipeline(step, width // STEP, a_spec, w_spec)
                multiply(a_ref.at[pl.ds(offset * unit, B)], w_ref.at[expert_ref[v]])
                return sum_ref[...]

            sum_BY = pl.run_scoped(add_up, gpu.ACC((B, columns)))

            def store(y_part):
                y_part[...] = sum_BY.astype(dtype)
                gpu.commit_smem()
                for u in range(B // unit):
                    row = offset + u
                    # The other rows are those of tiles before and after this one.
                    is_own = (row >= first) & (row < end)
                    pl.when(is_own)(functools.partial(store_unit, y_part, u, row))
                gpu.wait_smem_to_gmem(0, wait_read_only=True)

            def store_unit(y_part, u, row):
                gpu.copy_smem_to_gmem(
                    y_part.at[pl.ds(u * unit, unit)],
                    y_ref.at[pl.ds(row * unit, unit), pl.ds(n * columns, columns)],
                )

            pl.run_scoped(store, _stored((B, columns), dtype))

    # In units, so that the compiler sees what an offset is a multiple of.
    of_tiles = (
        tiles.expert_V,
        tiles.first_V // unit,
        -(-tiles.end_V // unit),
        tiles.num_tiles[None],
    )
    most = tiles.expert_V.shape[0] * (out_width // columns)
    out = _like(a_RX, (num_rows, out_width), dtype)
    y_RY = _call(kernel, out, most, interpret)(*of_tiles, a_RX, w_eXY)
    return _varying(y_RY, a_RX)


def _outer(
    a_RX: Array, b_RY: Array, layout: Layout, block: tuple[int, int], interpret: Any
) -> Array:
    """Returns a^T @ b of every expert's rows [e, X, Y]."""
    width, out_width = a_RX.shape[1], b_RY.shape[1]
    num_experts = layout.size_e.shape[0]
    dtype, wide = a_RX.dtype, wide_dtype(a_RX.dtype)
    unit = hopper.unit_rows(block)
    columns, out_columns = hopper.columns(width), hopper.columns(out_width)
    num_strips, strip_width = _strips(out_width // out_columns)
    grid = (num_experts, num_strips, width // columns, strip_width)

    def kernel(first_ref, count_ref, a_ref, b_ref, y_ref):
        @gpu.nd_loop(grid, collective_axes="block")
        def _(loop):
            i, strip, m, place = loop.index
            n = strip * strip_width + place
            first, count = first_ref[i], count_ref[i]

            def add_up(sum_ref):
                def step(_, a_part, b_part):
                    gpu.wgmma(sum_ref, a_part.T, b_part)

                a_spec = _part((unit, columns), lambda k: (first + k, m), dtype, unit)
                b_spec = _part((unit, out_columns), lambda k: (first + k, n), dtype, unit)

                # Of an expert without rows the sum is the zero that it begins with.
                @pl.when(count > 0)
                def _():
                    _pipeline(step, count, a_spec, b_spec)(a_ref, b_ref)

                return sum_ref[...]

            sum_XY = pl.run_scoped(add_up, gpu.ACC((columns, out_columns)))

            def store(y_part):
                y_part[...] = sum_XY
                gpu.commit_smem()
                own = pl.ds(m * columns, columns), pl.ds(n * out_columns, out_columns)
                gpu.copy_smem_to_gmem(y_part, y_ref.at[i, *own])
                gpu.wait_smem_to_gmem(0, wait_read_only=True)

            pl.run_scoped(store, _stored((columns, out_columns), wide))

    of_experts = layout.start_e // unit, -(-layout.size_e // unit)
    out = _like(a_RX, (num_experts, width, out_width), wide)
    y_eXY = _call(kernel, out, math.prod(grid), interpret)(*of_experts, a_RX, b_RY)
    return _varying(y_eXY, a_RX)


def _strips(num_columns: int) -> tuple[int, int]:
    """Returns how many strips there are of how many tiles of columns."""
    width = math.gcd(num_columns, STRIP)
    return num_columns // width, width


def _part(shape: tuple[int, int], index: Callable[[Array], Any], dtype: Any, sums: int) -> Any:
    """Returns what is fetched of a factor in a step that adds up so many products.

    WGMMA wants a pattern of shared memory that is no wider than they are.
    """
    # The products of a part go on while the next step begins.
    return gpu.BlockSpec(shape, index, transforms=_pattern(sums, dtype), delay_release=1)


def _stored(shape: tuple[int, int], dtype: Any) -> Any:
    """Returns the shared memory that a tile of the result leaves from."""
    return gpu.SMEM(shape, dtype, transforms=_pattern(shape[1], dtype))


def _pattern(width: int, dtype: Any) -> Any:
    """Returns the widest pattern of shared memory that rows of so many numbers can have."""
    size = jnp.dtype(dtype).itemsize
    swizzle = gpu.find_swizzle(width * size * 8)
    return gpu.TilingTransform((8, swizzle // size)), gpu.SwizzleTransform(swizzle)


def _pipeline(step: Callable[..., None], num_steps: Any, *parts: Any) -> Callable[..., None]:
    """Returns what runs `step(k, *parts)`, where the parts of both factors are fetched ahead."""
    return gpu.emit_pipeline(
        step, grid=(num_steps,), in_specs=parts, max_concurrent_steps=STEPS_AHEAD
    )


def _like(array: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the type of a result that varies over the mesh axes that the array varies over."""
    varying = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def _varying(y: Array, a_RX: Array) -> Array:
    """Returns a result that varies as a factor does: jax forgets what the type of it says."""
    y, _ = vary_alike(y, a_RX)
    return y


def _call(kernel: Callable[..., None], out: Any, most: int, interpret: Any) -> Callable[..., Array]:
    """Returns the kernel, of no more blocks than there can be tiles of the result."""
    return gpu.kernel(
        kernel,
        out_type=out,
        grid=(min(BLOCKS, most),),
        grid_names=("block",),
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
