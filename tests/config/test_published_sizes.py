"""Configs of published models have as many parameters as the models."""

from pathlib import Path

import pytest

from moe_jax import config
from moe_jax.config import command_line
from moe_jax.plan import flops


def parameters(name, *changes):
    """The counts of a shipped config, for the 64 devices of a small slice."""
    return flops.parameters(config.build(command_line.read(Path(name), changes), 64).model)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # transformers counts as many, and the papers say 46.7 B and 12.9 B, 6.9 B and 1.3 B.
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
        ("olmoe_1b7b", 6_919_161_856, 1_282_017_280),
    ],
)
def test_every_parameter_of_a_published_model_is_there(name, total, active):
    counts = parameters(name)
    assert (counts.total, counts.active) == (total, active)


def test_deepseek_has_its_parameters_and_those_of_the_further_block():
    """DeepSeek-V3 has 671,026,404,352 parameters without the module that predicts a token more
    (transformers counts as many).
    """
    own = parameters("deepseek_v3_shape", "--config.model.kinds.decoder.mtp_depths=0")
    assert own.total == 671_026_404_352
    assert 37.0e9 < own.active < 38.0e9
    # What joins two vectors to one, three norms, and a block like the others.
    d, heads, width = 7168, 128, 2048
    queries = d * 1536 + 1536 + 1536 * heads * (128 + 64)
    keys = d * (512 + 64) + 512 + 512 * heads * (128 + 128)
    attention = queries + keys + heads * 128 * d
    block = 2 * d + attention + 256 * d + 257 * 3 * d * width
    both = parameters("deepseek_v3_shape")
    assert both.total - own.total == 2 * d * d + 3 * d + block
