"""Matrices in FP8 with a scale for each block (DeepSeek-V3, arXiv:2412.19437, section 3.3.2): read
as bfloat16, as the code does that was released with the weights.

    NAME              [O, I]                 numbers e of four bits of exponent, three of mantissa
    NAME_scale_inv    [O / 128, I / 128]     float32, rounded up: a scale s for each 128 x 128
    what they say     [O, I]                 e * s, rounded once

Which matrices have it is told by their names: norms, the router, the embedding and the head have
not.

Shapes: O outputs, I inputs of a matrix.
"""

from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.errors import UserError
from moe_jax.interchange.entries import Entry, writes_nothing
from moe_jax.interchange.settings import Settings
from moe_jax.interchange.tensors import Folder, Unpacked

KEY, METHOD, FORMAT = "quantization_config", "fp8", "e4m3"
SCALE = "_scale_inv"
BLOCK = 128


def entry() -> Entry:
    """Returns the entry of `quantization_config`, of which FP8 in blocks is read."""

    def read(settings: Settings) -> dict[str, Any]:
        if settings.get(KEY) is None:
            return {}
        inner = settings.inner(KEY)
        told = (inner.get("quant_method"), inner.get("fmt", FORMAT), inner.get("weight_block_size"))
        if told != (METHOD, FORMAT, [BLOCK, BLOCK]):
            raise settings.refusal(
                KEY,
                f'moe_jax unpacks quant_method "{METHOD}" alone, of fmt "{FORMAT}" and '
                f"weight_block_size [{BLOCK}, {BLOCK}]",
            )
        return {}

    return Entry(read, writes_nothing)


def unpacked(folder: Folder) -> None:
    """Puts the matrices of a folder in the places of their numbers and scales.

    Raises UserError for scales that are of another matrix.
    """
    for scale in sorted(name for name in folder.names() if name.endswith(SCALE)):
        name = scale.removesuffix(SCALE)
        # One without its matrix is refused as a tensor too many.
        if name not in folder.names():
            continue
        shape, has = folder.shape(name), folder.shape(scale)
        wanted = tuple(-(-size // BLOCK) for size in shape)
        if has != wanted:
            raise UserError(
                f"{folder.where(scale)}: {scale} has the shape {list(has)}, and {name} of "
                f"{list(shape)} asks for {list(wanted)}"
            )
        folder.add(name, Unpacked((name, scale), shape, "bfloat16", unpack))


def unpack(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns a matrix [O, I] in bfloat16; its numbers are bytes."""
    num_outputs, num_inputs = numbers.shape
    wide = np.repeat(np.repeat(scales, BLOCK, axis=0), BLOCK, axis=1)
    values = numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (values * wide[:num_outputs, :num_inputs]).astype(ml_dtypes.bfloat16)
