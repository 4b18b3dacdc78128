"""Do the auxiliary losses pull against the language loss? Cosine and norm ratio of their gradients,
layer by layer.

For each MoE layer and each part of it (router, experts, attention, rest), g the gradient of the
language loss and a that of coefficient x auxiliary loss (x the adaptive weight, where there is one;
ReLU's "l1" has its state as coefficient):

    cosine = <g, a> / (|g| |a|)     below 0: balancing undoes what the language loss learns
    ratio  = |a| / |g|              how much of the step is the auxiliary loss's

of all auxiliary losses together ("auxiliary") and of each alone. The gradients are pulled back from
*one* forward pass, through the same totals of all micro-batches as in training, so both are exact
under accumulation. 0 where a gradient is zero.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import layout
from moe_jax.errors import UserError
from moe_jax.moe import losses
from moe_jax.moe.routing import ROUTERS
from moe_jax.parallel.mesh import P
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.train_step import Model, State, make_loss, step_key

PARTS = ("router", "experts", "attention", "rest")


def make_meter(cfg: Config, model: Model) -> Callable[[State, Any], dict[str, float]]:
    """Returns (state, batch) -> {"interference/layer_i/PART/LOSS_cosine": .., ".._ratio": ..}, with
    the randomness of that step.

    What is outside of the MoE blocks (embedding, head, dense blocks) is "interference/outside/...";
    i counts MoE layers.
    """
    coefficients = cfg.model.moe.losses
    router_adds = ROUTERS[cfg.model.moe.router].own_loss
    depth_adds = cfg.model.num_depth_blocks and cfg.model.depth.loss
    if not (any(coefficients.values()) or router_adds or depth_adds):
        raise UserError(
            "interference needs auxiliary losses beside the language loss, and every coefficient "
            "of model.moe.losses is 0"
        )
    loss = make_loss(cfg, model)

    @jax.jit
    def measure(state: State, batch: Any) -> dict[str, Any]:
        rng = step_key(cfg, state.step)

        def losses_of(params):
            value, aside = loss(params, state.router_state, batch, rng)
            return _terms(value, aside, coefficients)

        # One forward pass for all losses; `pull_back` makes one backward pass each.
        values, pull_back = jax.vjp(losses_of, state.params)

        def gradient(name):
            # The cotangent is 1 for the loss itself and 0 for the others.
            cotangents = jax.tree.map(jnp.zeros_like, values)
            cotangents[name] = jnp.ones_like(values[name])
            return pull_back(cotangents)[0]

        language = gradient("nll")
        auxiliary = [name for name in values if name != "nll"]
        return {name: _products(language, gradient(name), cfg.model) for name in auxiliary}

    def meter(state: State, batch: Any) -> dict[str, float]:
        rows = {}
        for name, products_of in jax.device_get(measure(state, batch)).items():
            for location, products in products_of.items():
                for kind, value in _figures(products).items():
                    rows[f"interference/{location}/{name}_{kind}"] = value
        return rows

    return meter


def _terms(value: jax.Array, aside: tuple[Any, Any], coefficients: Any) -> dict[str, jax.Array]:
    """Returns the language loss, the sum of all that is added to it, and each auxiliary loss as it
    is added, where there are several.
    """
    totals, parts = aside
    # All that is added to the language loss is the difference.
    terms = {"nll": parts["nll"], "auxiliary": value - parts["nll"]}
    named = losses.terms(totals["moe"], coefficients) if totals["moe"] else {}
    # A single one is "auxiliary" already.
    return terms | named if len(named) > 1 else terms


def _products(g: Any, a: Any, cfg: ModelConfig) -> dict[str, jax.Array]:
    """Returns {"layer_i/PART" or "outside": [3]}: the sums <g, a>, <g, g> and <a, a> over its
    parameters.
    """
    sums: dict[str, jax.Array] = {}
    leaves_g, _ = jax.tree_util.tree_flatten_with_path(g)
    for (path, leaf_g), leaf_a in zip(leaves_g, jax.tree.leaves(a), strict=True):
        keys = layout.keys_of(path)
        products_L3 = _products_of_leaf(leaf_g, leaf_a, layout.is_stacked(keys, cfg.scan))
        # None where a parameter is in no block.
        blocks = layout.block_numbers(keys, cfg)
        # A stacked leaf counts as a layer's only if all of its blocks have experts.
        if blocks is not None and layout.has_experts(cfg)[blocks].all():
            layers = np.atleast_1d(layout.moe_layer_numbers(keys, cfg))
            entries = {
                f"layer_{layer}/{_part(keys)}": products_L3[i] for i, layer in enumerate(layers)
            }
        else:
            entries = {"outside": products_L3.sum(0)}
        for location, products in entries.items():
            sums[location] = sums.get(location, 0) + products
    return sums


def _products_of_leaf(g: jax.Array, a: jax.Array, stacked: bool) -> jax.Array:
    """Returns [L, 3]: <g, a>, <g, g> and <a, a> of each layer of a leaf; L = 1 where it is not
    `stacked` over layers.
    """
    # Thousands of squares are added: bfloat16 has 8 bits.
    wide = jnp.promote_types(g.dtype, jnp.float32)
    g, a = g.astype(wide), a.astype(wide)
    # The dimension in front is that of the layers; the sum is over all others.
    over = tuple(range(int(stacked), g.ndim))
    products = [jax.sharding.reshard(z.sum(over), P()) for z in (g * a, g * g, a * a)]
    return jnp.stack(products, -1).reshape(-1, 3)


def _part(keys: list[Any]) -> str:
    return next((part for part in PARTS if part in keys), "rest")


def _figures(products: np.ndarray) -> dict[str, float]:
    dot, gg, aa = (float(z) for z in products)
    # A product of roots: gg * aa may be too large or too small for a float.
    norms = math.sqrt(gg) * math.sqrt(aa)
    cosine = dot / norms if norms else 0.0
    ratio = math.sqrt(aa / gg) if gg else 0.0
    return {"cosine": cosine, "ratio": ratio}
