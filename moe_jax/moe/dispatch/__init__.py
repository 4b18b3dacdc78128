"""Dispatchers: how tokens reach their experts and come back.

A dispatcher never knows which router ran. A new one is one file here and one line in DISPATCHERS;
the contract is in contract.py.
"""

from moe_jax.moe.dispatch import capacity, dropless, slots
from moe_jax.moe.dispatch.contract import Dispatcher

DISPATCHERS: dict[str, Dispatcher] = {
    "capacity": capacity.DISPATCHER,
    "dropless": dropless.DISPATCHER,
    "slots": slots.DISPATCHER,
}
# The dispatcher of any assignments that never drops one: decoding and proofs take it.
LOSSLESS = "dropless"
