"""A model as plain functions of its parameters: flax declares, jax runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_jax.models import MODELS
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import RouterState


class Model(NamedTuple):
    """The functions of a model: parameters go in as nested dicts of arrays, modules never leave."""

    init: Callable[
        [jax.Array], tuple[dict[str, Any], dict[str, Any]]
    ]  # key -> (params, router state)
    bind: Callable[[Any, Any], Any]  # (params, router state) -> the module, callable


def make_model(cfg: ModelConfig) -> Model:
    """Must be called with the mesh set; abstract evaluation only."""

    def split(key):
        return nnx.split(MODELS[cfg.kind].module(key, cfg), nnx.Param, RouterState)

    graphdef, params, router_state = nnx.eval_shape(split, jax.random.key(0))

    def init(key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        _, params, router_state = split(key)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(router_state)

    def bind(values: Any, state_values: Any) -> Any:
        return nnx.merge(graphdef, _filled(params, values), _filled(router_state, state_values))

    return Model(init, bind)


def _filled(state: Any, values: dict[str, Any]) -> Any:
    """The nnx State of the same structure as `state` with the arrays of a nested dict."""
    filled = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(filled, values)
    return filled
