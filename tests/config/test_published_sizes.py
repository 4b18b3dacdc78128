"""Configs of published models have as many parameters as the models."""

from pathlib import Path

import pytest

from moe_jax import config
from moe_jax.config import config_file
from moe_jax.plan import flops


def parameters(name):
    """The counts of a shipped config, for the 64 devices of a small slice."""
    return flops.parameters(config.build(config_file.read(Path(name)), 64).model)


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


def test_of_deepseek_all_but_its_attention_is_there():
    """DeepSeek-V3 has 671,026,404,352 parameters without the module that predicts further tokens;
    its attention is latent, ours is not.
    """
    d, heads, layers = 7168, 128, 61
    down_q, down_kv = d * 1536 + 1536, d * (512 + 64) + 512
    up_q, up_kv = 1536 * heads * (128 + 64), 512 * heads * (128 + 128)
    latent = down_q + down_kv + up_q + up_kv + heads * 128 * d
    counts = parameters("deepseek_v3_shape")
    assert counts.total - counts.attention + layers * latent == 671_026_404_352
