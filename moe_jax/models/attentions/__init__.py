"""The attentions by `model.attention`: one file and one line each; the contract is in contract.py.

Any of them goes with any kind of model that asks for a mask which it has.
"""

from moe_jax.models.attentions import grouped_query, latent, relative_bias, sliding_window
from moe_jax.models.attentions.contract import Attention

ATTENTIONS: dict[str, Attention] = {
    "grouped_query": grouped_query.ATTENTION,
    "sliding_window": sliding_window.ATTENTION,
    "latent": latent.ATTENTION,
    "relative_bias": relative_bias.ATTENTION,
}
