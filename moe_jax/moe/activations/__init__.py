"""The activations by `model.activation`, of dense feed-forwards and of experts: one file and one
line each; the contract is in contract.py.
"""

from moe_jax.moe.activations import clamped_swiglu, geglu, gelu, relu, swiglu
from moe_jax.moe.activations.contract import Activation

ACTIVATIONS: dict[str, Activation] = {
    "swiglu": swiglu.ACTIVATION,
    "gelu": gelu.ACTIVATION,
    "geglu": geglu.ACTIVATION,
    "clamped_swiglu": clamped_swiglu.ACTIVATION,
    "relu": relu.ACTIVATION,
}
