"""What a foreign layer is given, what it returns, and what it says of itself.

Shapes: T tokens, K choices of a token, E experts, D model, F hidden.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from moe_jax.errors import UserError

# What a layer may be given, and the arrays of `Inputs` that it gets for it.
GIVEN = {
    "router": ("router_DE",),
    "logits": ("logits_TE",),
    "choices": ("expert_TK", "gate_TK"),
}
SCORES = ("softmax", "sigmoid")
ACTIVATIONS = ("swiglu", "gelu")
# The limits of output and gradients relative to the largest entry, by the dtype of the layer.
LIMITS = {
    "float64": {"output": 1e-10, "drops": 0.0, "gradient": 1e-9},
    "float32": {"output": 1e-5, "drops": 0.0, "gradient": 1e-4},
}


class Inputs(NamedTuple):
    """Holds what a layer is given: jax arrays on the mesh, or NumPy arrays.

    What the layer did not ask for (`Layer.given`, `Layer.activation`) is None.
    """

    x_TD: Any
    # The weight of a linear router.
    router_DE: Any
    # The logits of a router that the layer does not see.
    logits_TE: Any
    # The chosen experts, int32, and the gate of each.
    expert_TK: Any
    gate_TK: Any
    # silu(x w_gate) * (x w_up) for "swiglu", gelu(x w_up) for "gelu"; w_down comes behind both.
    w_gate_EDF: Any
    w_up_EDF: Any
    w_down_EFD: Any
    # False for padding, which takes no place of a capacity and changes no other token.
    valid_T: Any


# What is no number that has a gradient.
WITHOUT_GRADIENT = ("expert_TK", "valid_T")


class Output(NamedTuple):
    """Holds what a layer may return in the place of its output alone."""

    # What it returns for padding is not looked at.
    y_TD: Any
    # Whether each choice was dropped; None = the layer does not tell.
    dropped_TK: Any = None


class Sizes(NamedTuple):
    """The sizes of the arrays; every axis of a mesh must divide what it splits."""

    tokens: int = 32
    d_model: int = 8
    experts: int = 8
    hidden: int = 8


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of somebody else, and what it says of itself. Raises UserError for what is unknown.

    The equation that it is held to, for a token that is not padding:

        s = softmax(logits) or sigmoid(logits)             logits = x router
        the k largest s are chosen; ties go to the lower expert
        gate = scale * s / sum of the chosen s             renormalize=False: scale * s
        y = sum over the chosen experts that have a place of gate * expert(x)

    Fields:
      forward: (inputs, mesh) -> y_TD or Output. A jax function is compiled, once for each mesh.
      k: experts per token.
      given: "router" (the layer computes logits), "logits" or "choices" (experts and gates).
      score, renormalize, scale: how gates follow from logits; unused where choices are given.
      activation: "swiglu", or "gelu" (the tanh approximation).
      capacity: places of each expert among `group_tokens` tokens that follow each other; those of
        earlier tokens come first, then those of earlier choices. None = nothing is dropped.
      group_tokens: None = all tokens are one group.
      masks: False where the layer reads no `valid_T`: then there is no padding.
      specs: how arrays lie on the mesh, by their names in `Inputs`; others are on every device.
      numpy: `forward` takes and returns NumPy arrays.
      backward: (inputs, dy_TD, mesh) -> {name of `Inputs`: gradient of the sum of y * dy}. Without
        it a jax layer is differentiated by jax.grad, and of a NumPy layer only the output is
        compared.
      dtype: "float64", or "float32" for a layer that has no other (LIMITS).
    """

    forward: Callable[[Inputs, Any], Any]
    k: int = 2
    given: str = "logits"
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    activation: str = "swiglu"
    capacity: int | None = None
    group_tokens: int | None = None
    masks: bool = True
    specs: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    numpy: bool = False
    backward: Callable[[Inputs, Any, Any], Mapping[str, Any]] | None = None
    dtype: str = "float64"

    def __post_init__(self):
        known = {
            "given": GIVEN,
            "score": SCORES,
            "activation": ACTIVATIONS,
            "dtype": LIMITS,
        }
        for name, values in known.items():
            value = getattr(self, name)
            if value not in values:
                raise UserError(
                    f'foreign.Layer: {name} = "{value}" is not known: choose one of '
                    f"{', '.join(values)}"
                )
        unknown = sorted(set(self.specs) - set(Inputs._fields))
        if unknown:
            raise UserError(
                f'foreign.Layer: specs has "{unknown[0]}", which is no array of a layer: they are '
                f"{', '.join(Inputs._fields)}"
            )

    @property
    def limits(self) -> dict[str, float]:
        """Returns the limit of each check."""
        return LIMITS[self.dtype]
