"""Experts stored as their non-zero blocks, for inference: less memory, and on a CPU less time where
few blocks are left.

The blocks of a column of b outputs lie below each other, so that the column is one product with the
inputs that they meet:

    values [E, J, n b, b]   n blocks for each of J columns of blocks, zeros where a column has fewer
    places [E, J, n]        the block of inputs that each is multiplied with

w_in is taken as one matrix [D, P F]. `convert compact` writes this format (docs/sparse_weights.md
has the measured crossover). It has no derivative, and its columns are not split over `model`.
Shapes: E experts, I inputs, O outputs, J = O / b, R rows, B rows at a time.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from moe_jax.moe.experts.blocks import serve_rows
from moe_jax.moe.experts.network import Chosen
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype
from moe_jax.schema.config import StoredConfig
from moe_jax.weights import Weight

NAMES = ("w_in", "w_out")


def declare(
    stored: StoredConfig, num_experts: int, outputs: Mapping[str, int]
) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """Declares (values, places) of the option `model.moe.sparse.stored`."""
    b = stored.block
    values, places = {}, {}
    for name in NAMES:
        num_columns = outputs[name] // b
        blocks_of_column = getattr(stored, name)
        values_shape = (num_experts, num_columns, blocks_of_column * b, b)
        places_shape = (num_experts, num_columns, blocks_of_column)
        values[name] = Weight(values_shape, ("experts", None, None, None), 1.0)
        places[name] = Weight(places_shape, ("experts", None, None), 0.0)
    return values, places


def outputs(d_model: int, hidden: int, activation: str) -> dict[str, int]:
    """Returns the columns O of each matrix; gate and up are side by side."""
    return {"w_in": Chosen(activation).parts * hidden, "w_out": d_model}


def _as_blocks(matrix_EIO: np.ndarray, b: int) -> np.ndarray:
    """Returns the matrices in blocks, [E, J, I / b, b, b]: column after column."""
    num_experts, num_inputs, num_outputs = matrix_EIO.shape
    blocks = matrix_EIO.reshape(num_experts, num_inputs // b, b, num_outputs // b, b)
    return blocks.transpose(0, 3, 1, 2, 4)


def used(matrix_EIO: np.ndarray, b: int) -> np.ndarray:
    """Returns which blocks are not all zero [E, J, I / b]."""
    return (_as_blocks(matrix_EIO, b) != 0).any((3, 4))


def pack(matrix_EIO: np.ndarray, b: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values, places) of matrices whose columns have at most n blocks that are not zero.

    The order of inputs is kept.
    """
    blocks = _as_blocks(matrix_EIO, b)
    is_used = used(matrix_EIO, b)
    # A stable sort of booleans: the used blocks first, both kinds in their order.
    order = np.argsort(~is_used, axis=2, kind="stable")
    places_EJn = order[:, :, :n].astype(np.int32)
    values = np.take_along_axis(blocks, places_EJn[..., None, None], 2)
    num_experts, num_columns = places_EJn.shape[:2]
    # [E, J, n, b, b] -> [E, J, n b, b]: the blocks of a column lie below each other.
    return values.reshape(num_experts, num_columns, n * b, b), places_EJn


def product(x_BI: jax.Array, values_JKb: jax.Array, places_Jn: jax.Array) -> jax.Array:
    """Returns x @ matrix [B, O], column after column of blocks; K = n b."""
    num_rows, b = x_BI.shape[0], values_JKb.shape[-1]
    # [I / b, B, b]: the inputs of a block are one entry of the first dimension.
    x_iBb = x_BI.reshape(num_rows, -1, b).swapaxes(0, 1)

    def column(_: None, of_column: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        values_Kb, places_n = of_column
        # [n, B, b] -> [B, n b]: the inputs that the blocks of this column meet.
        x_BK = x_iBb[places_n].swapaxes(0, 1).reshape(num_rows, -1)
        return None, x_BK @ values_Kb

    _, columns_JBb = jax.lax.scan(column, None, (values_JKb, places_Jn))
    return columns_JBb.swapaxes(0, 1).reshape(num_rows, -1)


def experts(
    values: Mapping[str, jax.Array], places: Mapping[str, jax.Array], chosen: Chosen
) -> Callable[..., jax.Array]:
    """Returns the experts of this device as a function of grouped rows.

    It is what `grouped_matmul.expert_ffn` is with whole matrices.
    """
    act = chosen.function()
    w_in, w_out = NAMES

    def run(x_RD, gate_R, start_e, size_e, block):
        stored = (values[w_in], places[w_in], values[w_out], places[w_out])
        rows = (x_RD, gate_R, start_e, size_e)
        x_RD, gate_R, start_e, size_e, *stored = vary_alike(*rows, *stored)

        def network(i: jax.Array, x_BD: jax.Array, gate_B: jax.Array) -> jax.Array:
            values_in, places_in, values_out, places_out = (array[i] for array in stored)
            wide = wide_dtype(x_BD.dtype)
            pre_BH = product(x_BD, values_in, places_in).astype(wide)
            # The gate weighs the hidden row, as in `expert_ffn`: combining is a plain sum.
            hidden_BF = act(pre_BH) * gate_B.astype(wide)[:, None]
            return product(hidden_BF.astype(x_BD.dtype), values_out, places_out)

        return serve_rows(network, x_RD, gate_R, start_e, size_e, block)

    return run
