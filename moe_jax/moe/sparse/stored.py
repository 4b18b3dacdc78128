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
from moe_jax.moe.experts.network import ACTIVATIONS, PARTS
from moe_jax.parallel.varying import vary_alike
from moe_jax.precision import wide_dtype
from moe_jax.schema.config import StoredConfig
from moe_jax.weights import Weight

NAMES = ("w_in", "w_out")


def declare(
    stored: StoredConfig, num_experts: int, outputs: Mapping[str, int]
) -> tuple[dict, dict]:
    """(values, places) of `model.moe.sparse.stored`: {block, w_in, w_out}, the last two blocks of a
    column.
    """
    b, values, places = stored.block, {}, {}
    for name in NAMES:
        shape = (num_experts, outputs[name] // b, getattr(stored, name))
        values[name] = Weight((*shape[:2], shape[2] * b, b), ("experts", None, None, None), 1.0)
        places[name] = Weight(shape, ("experts", None, None), 0.0)
    return values, places


def outputs(d_model: int, hidden: int, activation: str) -> dict[str, int]:
    return {"w_in": PARTS[activation] * hidden, "w_out": d_model}


def used(matrix_EIO: np.ndarray, b: int) -> np.ndarray:
    """Returns which blocks are not all zero [E, J, I / b]."""
    e, i, o = matrix_EIO.shape
    return (matrix_EIO.reshape(e, i // b, b, o // b, b) != 0).any((2, 4)).transpose(0, 2, 1)


def pack(matrix_EIO: np.ndarray, b: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, places) of matrices whose columns have at most n blocks that are not zero; the order
    of inputs is kept.
    """
    e, i, o = matrix_EIO.shape
    blocks = matrix_EIO.reshape(e, i // b, b, o // b, b).transpose(
        0, 3, 1, 2, 4
    )  # [E, J, I / b, b, b]
    here = used(matrix_EIO, b)
    places = np.argsort(~here, axis=2, kind="stable")[:, :, :n].astype(np.int32)
    values = np.take_along_axis(blocks, places[..., None, None], 2)
    return values.reshape(e, o // b, n * b, b), places


def product(x_BI: jax.Array, values_JKb: jax.Array, places_Jn: jax.Array) -> jax.Array:
    """x @ matrix [B, O], column after column of blocks: each gathers its inputs."""
    b = values_JKb.shape[-1]
    x_bBb = x_BI.reshape(x_BI.shape[0], -1, b).swapaxes(0, 1)

    def column(_, of: tuple[jax.Array, jax.Array]):
        values_Kb, places_n = of
        x_BK = x_bBb[places_n].swapaxes(0, 1).reshape(x_BI.shape[0], -1)
        return None, x_BK @ values_Kb

    columns_JBb = jax.lax.scan(column, None, (values_JKb, places_Jn))[1]
    return columns_JBb.swapaxes(0, 1).reshape(x_BI.shape[0], -1)


def experts(
    values: Mapping[str, jax.Array], places: Mapping[str, jax.Array], activation: str
) -> Callable[..., jax.Array]:
    """The experts of this device as a function of grouped rows, as `grouped_matmul.expert_ffn` with
    whole matrices.
    """
    act = ACTIVATIONS[activation]

    def run(x_RD, gate_R, start_e, size_e, block):
        x_RD, gate_R, start_e, size_e, *stored = vary_alike(
            x_RD,
            gate_R,
            start_e,
            size_e,
            *(store[name] for name in NAMES for store in (values, places)),
        )

        def network(i: jax.Array, x_BD: jax.Array, gate_B: jax.Array) -> jax.Array:
            v_in, p_in, v_out, p_out = (z[i] for z in stored)
            wide = wide_dtype(x_BD.dtype)
            hidden_BF = act(product(x_BD, v_in, p_in).astype(wide)) * gate_B.astype(wide)[:, None]
            return product(hidden_BF.astype(x_BD.dtype), v_out, p_out)

        return serve_rows(network, x_RD, gate_R, start_e, size_e, block)

    return run
