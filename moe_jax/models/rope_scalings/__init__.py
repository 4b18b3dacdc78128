"""The rotary scalings by `model.rope_scaling`: one file and one line each; the contract is in
contract.py.
"""

from moe_jax.models.rope_scalings import linear, llama3, unscaled, yarn
from moe_jax.models.rope_scalings.contract import RopeScaling

# The choice that changes nothing.
UNSCALED = "none"
ROPE_SCALINGS: dict[str, RopeScaling] = {
    UNSCALED: unscaled.ROPE_SCALING,
    "linear": linear.ROPE_SCALING,
    "llama3": llama3.ROPE_SCALING,
    "yarn": yarn.ROPE_SCALING,
}
