"""Routers: which experts take which token, and with what weight.

A new router is one file here, one line in ROUTERS, and its options in configs/base.py. The contract is in contract.py; field by field:

`params(sizes, options)` and `state(sizes, options)` declare weights. `route` runs as one-device code on the tokens of one device, in at least
float32, and returns a Routing: a flat list of assignments in order of priority, with every statistic as a *sum per row*, so that balance
losses are the same on every mesh. `update` runs once per optimizer step and layer, on the totals of the whole batch, outside of autodiff.
`sees` tells what a token's output may depend on: a causal model refuses a router that sees the future (moe/causality.py).
"""

from moe_jax.moe.routing import top_k
from moe_jax.moe.routing.contract import Router, keep_state, linear_gate, no_weights, sees_nothing

ROUTERS: dict[str, Router] = {
    "top_k": Router(linear_gate, no_weights, top_k.route, keep_state, sees_nothing, top_k.declared),
}
