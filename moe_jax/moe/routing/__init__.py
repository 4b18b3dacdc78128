"""Routers: which experts take which token, and with what weight.

A new router is one file here and one line in ROUTERS: its Options, its functions, and `ROUTER`,
which says all that others need to know of it. The contract is in contract.py, field by field.
`route` is one-device code on the tokens of one device, in at least float32; it returns a flat list
of assignments in order of priority, with every statistic as a *sum per row*, so that balance losses
are the same on every mesh. `update` runs once per optimizer step and layer, on the totals of the
whole batch, outside of autodiff.
"""

from moe_jax.moe.routing import (
    base,
    cosine,
    expert_choice,
    hash,
    multi_gate,
    noisy_top_k,
    null,
    quantile,
    random,
    recorded,
    relu,
    sigmoid,
    soft,
    switch,
    top_k,
    uniform,
)
from moe_jax.moe.routing.contract import Router

ROUTERS: dict[str, Router] = {
    "top_k": top_k.ROUTER,
    "switch": switch.ROUTER,
    "noisy_top_k": noisy_top_k.ROUTER,
    "sigmoid": sigmoid.ROUTER,
    "quantile": quantile.ROUTER,
    "cosine": cosine.ROUTER,
    "multi_gate": multi_gate.ROUTER,
    "null": null.ROUTER,
    "uniform": uniform.ROUTER,
    "random": random.ROUTER,
    "hash": hash.ROUTER,
    "base": base.ROUTER,
    "relu": relu.ROUTER,
    "expert_choice": expert_choice.ROUTER,
    "soft": soft.ROUTER,
    "recorded": recorded.ROUTER,
}
