"""A model as plain functions of its parameters: flax declares, jax runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from moe_jax.models import MODELS
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import RouterState


class Model(NamedTuple):
    """The functions of a model: parameters go in as nested dicts of arrays, modules never leave."""

    # key -> (params, router state).
    init: Callable[[Array], tuple[dict[str, Any], dict[str, Any]]]
    # (params, router state) -> the module, callable.
    bind: Callable[[Any, Any], Any]


def make_model(cfg: ModelConfig) -> Model:
    """Returns the functions of the model of a config. Must be called with the mesh set; abstract
    evaluation only.
    """

    def split(key):
        module = MODELS[cfg.kind].module(key, cfg)
        return nnx.split(module, nnx.Param, RouterState)

    # Drawn abstractly: the structure is known before any array is there.
    graphdef, params, router_state = nnx.eval_shape(split, jax.eval_shape(jax.random.key, 0))

    def init(key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        _, params, router_state = split(key)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(router_state)

    def bind(values: Any, state_values: Any) -> Any:
        filled = _filled(params, values), _filled(router_state, state_values)
        return nnx.merge(graphdef, *filled)

    return Model(init, bind)


def _filled(state: Any, values: dict[str, Any]) -> Any:
    """Returns the nnx State of the same structure as `state` with the arrays of a nested dict."""
    # A copy: the call after it writes into its argument.
    filled = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(filled, values)
    return filled
