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
    model_cfg = cfg.model
    deep = model_cfg.num_depth_blocks and model_cfg.depth.loss
    if not (any(model_cfg.moe.losses.values()) or ROUTERS[model_cfg.moe.router].own_loss or deep):
        raise UserError(
            "interference needs auxiliary losses beside the language loss, and every coefficient "
            "of model.moe.losses is 0"
        )
    loss = make_loss(cfg, model)

    @jax.jit
    def measure(state: State, batch: Any) -> dict[str, Any]:
        rng = step_key(cfg, state.step)

        def run(params):
            return _terms(*loss(params, state.router_state, batch, rng), cfg.model.moe.losses)

        values, pull = jax.vjp(run, state.params)

        def one(name):
            return {
                n: (jnp.ones_like if n == name else jnp.zeros_like)(v) for n, v in values.items()
            }

        language = pull(one("nll"))[0]
        return {
            name: _products(language, pull(one(name))[0], cfg.model)
            for name in values
            if name != "nll"
        }

    def meter(state: State, batch: Any) -> dict[str, float]:
        return {
            f"interference/{place}/{name}_{kind}": value
            for name, places in jax.device_get(measure(state, batch)).items()
            for place, products in places.items()
            for kind, value in _figures(products).items()
        }

    return meter


def _terms(value: jax.Array, aside: tuple[Any, Any], coefficients: Any) -> dict[str, jax.Array]:
    """Returns the language loss, the sum of all that is added to it, and each auxiliary loss as it
    is added, where there are several.
    """
    totals, parts = aside
    named = losses.terms(totals["moe"], coefficients) if totals["moe"] else {}
    return {"nll": parts["nll"], "auxiliary": value - parts["nll"]} | (
        named if len(named) > 1 else {}
    )


def _products(g: Any, a: Any, cfg: ModelConfig) -> dict[str, jax.Array]:
    """Returns {"layer_i/PART" or "outside": [3]}: the sums <g, a>, <g, g> and <a, a> over its
    parameters.
    """
    sums: dict[str, jax.Array] = {}
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(g)[0], jax.tree.leaves(a), strict=True
    ):
        keys = layout.keys_of(path)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x, y = x.astype(wide), y.astype(wide)
        over = tuple(range(int(layout.is_stacked(keys, cfg.scan)), x.ndim))
        products = jnp.stack(
            [jax.sharding.reshard(z.sum(over), P()) for z in (x * y, x * x, y * y)], -1
        )
        blocks = layout.block_numbers(keys, cfg)
        if blocks is not None and layout.has_experts(cfg)[blocks].all():
            layers = np.atleast_1d(layout.moe_layer_numbers(keys, cfg))
            entries = {
                f"layer_{layer}/{_part(keys)}": products.reshape(-1, 3)[i]
                for i, layer in enumerate(layers)
            }
        else:
            entries = {"outside": products.reshape(-1, 3).sum(0)}
        sums |= {name: sums.get(name, 0) + three for name, three in entries.items()}
    return sums


def _part(keys: list[Any]) -> str:
    inside = [part for part in PARTS if part in keys]
    return inside[0] if inside else "rest"


def _figures(products: np.ndarray) -> dict[str, float]:
    dot, gg, aa = (float(z) for z in products)
    norms = math.sqrt(gg) * math.sqrt(aa)
    return {"cosine": dot / norms if norms else 0.0, "ratio": math.sqrt(aa / gg) if gg else 0.0}
