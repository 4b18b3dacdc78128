"""From config files and flags to the frozen `Config`: the tree of keys, its defaults, the rules."""

from moe_jax.config.build import RESUME_MAY_CHANGE, allow_float64, build, refuse_unchosen
from moe_jax.config.tree import defaults
from moe_jax.schema.config import Config

__all__ = ["RESUME_MAY_CHANGE", "Config", "allow_float64", "build", "defaults", "refuse_unchosen"]
