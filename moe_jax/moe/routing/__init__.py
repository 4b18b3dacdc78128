"""Routers: which experts take which token, and with what weight.

A new router is one file here, one line in ROUTERS, and its options in configs/base.py. The contract
is in contract.py; field by field:

`params(sizes, options)` and `state(sizes, options)` declare weights. `route` is one-device code on
the tokens of one device, in at least float32, and returns a Routing: a flat list of assignments in
order of priority, with every statistic as a *sum per row*, so that balance losses are the same on
every mesh. `update` runs once per optimizer step and layer, on the totals of the whole batch,
outside of autodiff. `sees` tells what a token's output may depend on: a causal model refuses a
router that sees the future (moe/causality.py).
"""

from moe_jax.moe.routing import (
    base,
    baselines,
    cosine,
    expert_choice,
    hash,
    multi_gate,
    noisy_top_k,
    null,
    quantile,
    recorded,
    relu,
    sigmoid,
    soft,
    switch,
    top_k,
)
from moe_jax.moe.routing.contract import Router, keep_state, linear_gate, no_weights, sees_nothing

ROUTERS: dict[str, Router] = {
    "top_k": Router(linear_gate, no_weights, top_k.route, keep_state, sees_nothing, top_k.declared),
    "switch": Router(
        linear_gate, no_weights, switch.route, keep_state, sees_nothing, switch.declared
    ),
    "noisy_top_k": Router(
        noisy_top_k.params,
        no_weights,
        noisy_top_k.route,
        keep_state,
        sees_nothing,
        noisy_top_k.declared,
    ),
    "sigmoid": Router(
        linear_gate,
        sigmoid.bias_state,
        sigmoid.route,
        sigmoid.update,
        sees_nothing,
        sigmoid.declared,
    ),
    "quantile": Router(
        linear_gate,
        sigmoid.bias_state,
        quantile.route,
        quantile.update,
        sees_nothing,
        sigmoid.declared,
    ),
    "cosine": Router(
        cosine.params, no_weights, cosine.route, keep_state, sees_nothing, cosine.declared
    ),
    "multi_gate": Router(
        multi_gate.params,
        no_weights,
        multi_gate.route,
        keep_state,
        sees_nothing,
        multi_gate.declared,
    ),
    "null": Router(null.params, no_weights, null.route, keep_state, sees_nothing, null.declared),
    "uniform": Router(
        no_weights,
        no_weights,
        baselines.route_uniform,
        keep_state,
        sees_nothing,
        baselines.declared,
    ),
    "random": Router(
        no_weights,
        baselines.salt,
        baselines.route_random,
        keep_state,
        sees_nothing,
        baselines.declared,
    ),
    "hash": Router(no_weights, no_weights, hash.route, keep_state, sees_nothing, hash.declared),
    "base": Router(linear_gate, no_weights, base.route, keep_state, base.sees, base.declared),
    "relu": Router(linear_gate, relu.state, relu.route, relu.update, sees_nothing, relu.declared),
    "expert_choice": Router(
        linear_gate,
        no_weights,
        expert_choice.route,
        keep_state,
        expert_choice.sees,
        expert_choice.declared,
        own_capacity=True,
    ),
    "soft": Router(soft.params, no_weights, soft.route, keep_state, soft.sees, soft.declared),
    "recorded": Router(
        linear_gate, no_weights, recorded.route, keep_state, sees_nothing, recorded.declared
    ),
}
