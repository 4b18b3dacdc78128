"""The states of all routers of a model as arrays over its MoE layers, in the order of `totals`, and
back.

The model holds them where its blocks are: a list for the loop, stacked over the repeats for the
scan. Shapes: L MoE layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models import encdec
from moe_jax.models.decoder import as_decoder
from moe_jax.models.encdec import encoder_config
from moe_jax.schema.config import ModelConfig


def stack(states: Any, cfg: ModelConfig) -> dict[str, jax.Array]:
    """{name: [L, ...]} from the nested dict of a model."""
    parts: dict[str, list[jax.Array]] = {}
    layers: dict[str, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(states)[0]:
        name, place = path[-1].key, layers_of(path, cfg)
        parts.setdefault(name, []).append(leaf if place.ndim else leaf[None])
        layers.setdefault(name, []).append(np.atleast_1d(place))
    return {
        name: jnp.concatenate(parts[name])[np.argsort(np.concatenate(layers[name]))]
        for name in parts
    }


def unstack(states: Any, stacked: dict[str, jax.Array], cfg: ModelConfig) -> Any:
    """The nested dict of a model, of the structure of `states`, with the arrays of `stacked`."""

    def take(path, leaf):
        return stacked[path[-1].key][layers_of(path, cfg)].astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(take, states)


def layers_of(path: Any, cfg: ModelConfig) -> np.ndarray:
    """Which MoE layers a leaf of the model belongs to: a number, or one for every repeat of a scan."""
    keys = [key.key for key in path]
    if cfg.kind == encdec.NAME:
        encoder = encoder_config(cfg)
        if keys[0] == "encoder":
            return layers_of(path[1:], encoder)
        return encoder.num_moe_layers + layers_of(path, as_decoder(cfg))

    def count(blocks):
        return sum(kind.endswith("moe") for kind in blocks)

    first, period = count(cfg.prefix), count(cfg.period)
    if keys[0] == "prefix":
        return np.array(count(cfg.prefix[: keys[1]]))
    if keys[0] == "suffix":
        return np.array(first + period * cfg.repeats + count(cfg.suffix[: keys[1]]))
    repeat, block = (np.arange(cfg.repeats), keys[2]) if cfg.scan else (np.array(keys[1]), keys[3])
    return first + repeat * period + count(cfg.period[:block])
