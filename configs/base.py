"""`get_config()`: all defaults, for config files that were written when they stood in this file.

Every key, its default and its comment: `python -m moe_jax config`.
"""

from ml_collections import ConfigDict

from moe_jax.config import defaults

VARIANTS = ()


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns all defaults. There are no variants, so an argument is one that nobody knows."""
    if arg is not None:
        raise KeyError(arg)
    return defaults()
