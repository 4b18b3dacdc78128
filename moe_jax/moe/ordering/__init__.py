"""Orderings: which assignment wins when capacity is short.

Any ordering goes with any router that makes assignments. A new one is one file here and one line in
ORDERINGS; the contract is in contract.py.
"""

from moe_jax.moe.ordering import batch_priority, k_major, rounding, token_major
from moe_jax.moe.ordering.contract import Ordering

ORDERINGS: dict[str, Ordering] = {
    "token_major": token_major.ORDERING,
    "k_major": k_major.ORDERING,
    "batch_priority": batch_priority.ORDERING,
    "rounding": rounding.ORDERING,
}
# The order in which a router lists its assignments, which is as good as none.
AS_LISTED = "token_major"
