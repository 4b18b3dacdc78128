"""Names of the leaves of a tree, as checkpoints store them and messages show them.

An example is "layers/repeats/0/attention/q".
"""

from typing import Any

import jax


def name_of(path: Any) -> str:
    """Returns the name of a leaf from its key path; the value of an nnx Variable has the name of
    the Variable.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
