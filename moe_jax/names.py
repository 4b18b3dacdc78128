"""Names of the leaves of a tree, as checkpoints store them and messages show them:

"layers/repeats/0/attention/q".
"""

from typing import Any

import jax

# the key below which a model built with scan stacks its layers, and a looping one numbers them
REPEATS = "repeats"


def name_of(path: Any) -> str:
    """The name of a leaf from its key path; the value of an nnx Variable has the name of the
    Variable.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_layer(name: str) -> bool:
    """Is the leaf below "repeats", that is, one of the layers that scan stacks?"""
    return REPEATS in name.split("/")
