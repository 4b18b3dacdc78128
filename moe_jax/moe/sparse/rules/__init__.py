"""Rules: who decides which weights of an expert are zero.

A new one is one file here and one line in RULES; the contract is in contract.py. Without a rule
(`model.moe.sparse.rule = "none"`) experts are dense.
"""

from moe_jax.moe.sparse.rules import group_lasso, magnitude, rigl, set, static, threshold
from moe_jax.moe.sparse.rules.contract import Rule

RULES: dict[str, Rule] = {
    "static": static.RULE,
    "threshold": threshold.RULE,
    "magnitude": magnitude.RULE,
    "set": set.RULE,
    "rigl": rigl.RULE,
    "group_lasso": group_lasso.RULE,
}
