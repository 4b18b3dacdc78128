"""Patterns: what is zero together. A new one is one file here and one line in PATTERNS."""

from moe_jax.moe.sparse.patterns import blocks, n_m, units, unstructured
from moe_jax.moe.sparse.patterns.contract import Pattern

PATTERNS: dict[str, Pattern] = {
    "unstructured": unstructured.PATTERN,
    "n_m": n_m.PATTERN,
    "blocks": blocks.PATTERN,
    "units": units.PATTERN,
}
