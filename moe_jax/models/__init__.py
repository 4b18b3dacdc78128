"""The models by `model.kind`: one file and one line each.

A model is an nnx.Module `Model(key, cfg)`.

It is called with (batch, rng, train) and gives (outputs, sums), sums per row of its layers {name:
[L, B, ...]}.
"""

from typing import Any

from moe_jax.models.article import Article
from moe_jax.models.decoder import Decoder
from moe_jax.models.encdec import EncDec
from moe_jax.models.encoder import Encoder
from moe_jax.models.mmoe import MMoE

MODELS: dict[str, Any] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encdec": EncDec,
    "mmoe": MMoE,
    "article": Article,
}
