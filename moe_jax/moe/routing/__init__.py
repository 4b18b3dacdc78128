"""Routers: which experts take which token, and with what weight.

A new router is one file here and one line in ROUTERS. The contract is below; field by field:

`params(cfg)` and `state(cfg)` declare weights. `route` runs as one-device code on the tokens of one device, in at least float32, and
returns a Routing: a flat list of assignments in order of priority, with every statistic as a *sum per row*, so that balance losses are
the same on every mesh. `update` runs once per optimizer step on the totals of the whole batch, outside of autodiff.

Shapes: T tokens of this device, D model, E experts, N assignments, b rows (sequences) of this device.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.moe.routing import top_k


class Router(NamedTuple):
    params: Callable[..., dict[str, Any]]  # (d_model, num_experts, options) -> {name: Weight}
    state: Callable[..., dict[str, Any]]  # (d_model, num_experts, options) -> {name: Weight}
    route: Callable[..., Any]  # (params, state, tokens, *, cfg, rng, train, total) -> Routing
    update: Callable[..., Mapping[str, jax.Array]]  # (state, totals, cfg) -> state
    sees_future: bool  # may a later token change an earlier output?
    sees_batch: bool  # may another sequence change an output?


ROUTERS: dict[str, Router] = {
    "top_k": Router(top_k.params, top_k.state, top_k.route, top_k.update, sees_future=False, sees_batch=False),
}
