"""The models by `model.kind`: one file and one line each; the contract is in contract.py."""

from moe_jax.models import article, decoder, encdec, encoder, mmoe
from moe_jax.models.contract import Kind

MODELS: dict[str, Kind] = {
    decoder.NAME: decoder.KIND,
    encoder.NAME: encoder.KIND,
    encdec.NAME: encdec.KIND,
    mmoe.NAME: mmoe.KIND,
    article.NAME: article.KIND,
}
