"""Experts in MXFP4 (Open Compute Project 2023, OCP Microscaling Formats 1.0, sections 5.2 and 6.3),
as gpt-oss has them: read as bfloat16, which holds every one of their values.

    NAME_blocks [E, O, I / 32, 16]   bytes of two numbers each, the first in the low bits
    NAME_scales [E, O, I / 32]       bytes s: the 32 numbers of a block times 2^(s - 127)
    NAME        [E, I, O]            what they say

Shapes: E experts, I inputs, O outputs of a matrix.
"""

from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.interchange.entries import Entry, writes_nothing
from moe_jax.interchange.settings import Settings
from moe_jax.interchange.tensors import Folder, Unpacked

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
# E2M1: a sign, two bits of exponent, one of mantissa.
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*POSITIVE, *(-value for value in POSITIVE)], np.float32)
SCALE_BIAS = 127


def entry() -> Entry:
    """Returns the entry of `quantization_config`, of which mxfp4 is read."""

    def read(settings: Settings) -> dict[str, Any]:
        if settings.get("quantization_config") is not None:
            method = settings.inner("quantization_config").get("quant_method")
            if method != METHOD:
                raise settings.refusal(
                    "quantization_config", f'moe_jax unpacks quant_method "{METHOD}" alone'
                )
        return {}

    return Entry(read, writes_nothing)


def unpacked(folder: Folder) -> None:
    """Puts the matrices of a folder in the places of their blocks and scales."""
    for blocks in sorted(name for name in folder.names() if name.endswith(BLOCKS)):
        name = blocks.removesuffix(BLOCKS)
        parts = (blocks, name + SCALES)
        if parts[1] in folder.names():
            num_experts, outputs, num_blocks, num_bytes = folder.shape(blocks)
            shape = (num_experts, 2 * num_blocks * num_bytes, outputs)
            folder.add(name, Unpacked(parts, shape, "bfloat16", unpack))


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns matrices [E, I, O] in bfloat16."""
    pairs = np.stack([VALUES[blocks & 0x0F], VALUES[blocks >> 4]], axis=-1)
    scale = np.ldexp(np.float32(1), scales.astype(np.int32) - SCALE_BIAS)
    values = pairs * scale[..., None, None]
    num_experts, outputs = blocks.shape[:2]
    matrices = values.reshape(num_experts, outputs, -1).astype(ml_dtypes.bfloat16)
    return matrices.transpose(0, 2, 1)
