"""From config files and flags to the frozen `Config`: reading, defaults, bounds, and the rules
between keys.
"""

from moe_jax.config.build import RESUME_MAY_CHANGE, build, freeze, profile_range, refuse_unchosen
from moe_jax.config.tree import defaults
from moe_jax.schema.config import Config, due

__all__ = [
    "RESUME_MAY_CHANGE",
    "Config",
    "build",
    "defaults",
    "due",
    "freeze",
    "profile_range",
    "refuse_unchosen",
]
