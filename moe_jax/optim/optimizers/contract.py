"""What an optimizer is: `direction(leaves, options)` -> the direction of an update.

Weight decay and the learning rate come after it (optim/__init__.py). `leaves` is a tree of Leaf,
shaped like the parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from moe_jax import layout


class Optimizer(NamedTuple):
    """Holds all that there is to know of an optimizer; `OPTIMIZER` of its file."""

    # The frozen dataclass of its block in the config; `weight_decay` is among its keys.
    options: type
    direction: Callable[[Any, Any], optax.GradientTransformation]
    # Fields of its state that are means of squares: gradients times c make them times c squared.
    squares: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Holds what an optimizer may know of a parameter besides its gradient."""

    name: str  # "layers/repeats/attention/q"
    # Without the axis of layers.
    ndim: int
    # Has a leading axis of layers.
    stacked: bool


def leaf_by_leaf(inner: optax.GradientTransformation, leaves: Any) -> optax.GradientTransformation:
    """Runs `inner` on every array alone, and on every layer of a stack alone; one inner state per
    array.
    """
    flat, treedef = jax.tree.flatten(leaves)

    def each(f: Callable[..., Any], *trees: Any) -> list[Any]:
        rows = zip(flat, *(treedef.flatten_up_to(tree) for tree in trees))
        return [layout.per_layer(f, leaf.stacked)(*row) for leaf, *row in rows]

    def init(params: Any) -> Any:
        return treedef.unflatten(each(inner.init, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        done = each(inner.update, updates, state, params)
        return treedef.unflatten(u for u, _ in done), treedef.unflatten(s for _, s in done)

    return optax.GradientTransformation(init, update)
