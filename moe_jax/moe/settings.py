"""What an MoE layer is told, and what follows from it: the weights that it declares, and how many
assignments it means to have.

Shapes: D model, E experts, F expert hidden, P = 2 for SwiGLU else 1.
"""

import dataclasses
import math
from typing import Any

from moe_jax.moe.experts import narrow
from moe_jax.moe.experts.grouped_matmul import BY_PLATFORM
from moe_jax.moe.experts.network import Chosen
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.sparse import stored
from moe_jax.schema.config import AdaptiveConfig, StoredConfig
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class MoE:
    """Holds what the layer is told: the config's `model.moe` block, and what it shares with the
    rest of the model.
    """

    num_experts: int
    group_rows: int
    router: str
    router_options: Any
    ordering: str
    ordering_options: Any
    adaptive: AdaptiveConfig
    vocab_size: int
    dispatcher: str
    dispatcher_options: Any
    d_model: int
    expert_hidden: int
    activation: str
    param_dtype: str
    dtype: str
    # The standard deviation of the first value of w_out.
    out_std: float
    # Experts as blocks (sparse/stored.py); block 0 = whole matrices.
    stored: StoredConfig
    # One of grouped_matmul.KERNELS, or "auto".
    expert_kernel: str = BY_PLATFORM
    # "full", or one of narrow.KINDS.
    numbers: str = narrow.FULL
    # None = the defaults of the activation.
    activation_options: Any = None
    expert_bias: bool = False
    # Parts of the tokens that are dispatched each by itself (dispatch/chunks.py).
    overlap_chunks: int = 1
    # The width that the routed experts work in (latent.py); 0 = d_model.
    latent_dim: int = 0

    @property
    def expert_dim(self) -> int:
        """Returns the width that the routed experts read and write."""
        return self.latent_dim or self.d_model

    @property
    def chosen(self) -> Chosen:
        """Returns the activation with its options."""
        return Chosen(self.activation, self.activation_options)


def expert_weights(cfg: MoE) -> dict[str, Weight]:
    """Declares the weights of the experts, w_in [E, D, P, F] and w_out [E, F, D], or as blocks."""
    if cfg.stored.block:
        return stored_weights(cfg)[0]
    num_parts, width = cfg.chosen.parts, cfg.expert_dim
    # Gate and up are an axis of their own, so that F can be split over `model` without pairing
    # wrong columns.
    in_shape = (cfg.num_experts, width, num_parts, cfg.expert_hidden)
    out_shape = (cfg.num_experts, cfg.expert_hidden, width)
    in_names = ("experts", "expert_embed", None, "hidden")
    out_names = ("experts", "hidden", "expert_embed")
    weights = {
        "w_in": Weight(in_shape, in_names, width**-0.5),
        "w_out": Weight(out_shape, out_names, cfg.out_std),
    }
    if cfg.expert_bias:
        in_shape = (cfg.num_experts, num_parts, cfg.expert_hidden)
        out_shape = (cfg.num_experts, width)
        weights["in_bias"] = Weight(in_shape, ("experts", None, "hidden"), 0.0)
        # Not split over `data`: it is small.
        weights["out_bias"] = Weight(out_shape, ("experts", None), 0.0)
    return weights


def stored_weights(cfg: MoE) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """Declares (values, places) of experts that are stored as blocks."""
    outputs = stored.outputs(cfg.expert_dim, cfg.expert_hidden, cfg.activation)
    return stored.declare(cfg.stored, cfg.num_experts, outputs)


def adaptive_state(cfg: MoE) -> dict[str, Weight]:
    """Declares the weight of the balance losses where the drop rate drives it (`losses.adapt`)."""
    return {"balance_weight": Weight((), (), 0.0, 1.0)} if cfg.adaptive.rate else {}


def num_intended(cfg: MoE, num_tokens: int, num_places: int) -> int:
    """Returns how many of the places that a router may fill it fills when the load is as it
    intends; padding counts as tokens.
    """
    average = ROUTERS[cfg.router].declared(cfg.num_experts, cfg.router_options).average
    if average is None:
        return num_places
    return min(num_places, math.ceil(average * num_tokens))
