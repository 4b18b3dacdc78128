"""Optimizers:

`(leaves, options) -> the direction of the update`, before weight decay and the learning rate.

A new one is a function here and a line in OPTIMIZERS. `leaves` is a tree of Leaf, shaped like the
parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from moe_jax import layout
from moe_jax.optim.muon import MATRICES, orthogonalize


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What an optimizer may know of a parameter besides its gradient."""

    name: str  # "layers/repeats/attention/q"
    ndim: int  # without the axis of layers
    stacked: bool  # has a leading axis of layers


def adamw(leaves: Any, *, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1); the decay of AdamW is added by `make`."""
    del leaves
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def lion(leaves: Any, *, b1: float, b2: float) -> optax.GradientTransformation:
    """Lion (arXiv:2302.06675): the sign of momentum mixed with the gradient.

    Wants about a tenth of AdamW's rate.
    """
    del leaves
    return optax.scale_by_lion(b1=b1, b2=b2)


def adafactor(leaves: Any, *, decay_rate: float) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) without momentum; the mean square is factored over the two
    largest dims >= 128.

    The update is clipped to a root mean square of 1 and scaled by that of the parameter, so the
    learning rate is *relative* (about 1e-2). Statistics are per array: the experts of a layer are
    one array, the layers of a stack not.
    """
    rms = optax.scale_by_factored_rms(decay_rate=decay_rate)
    return leaf_by_leaf(
        optax.chain(rms, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()), leaves
    )


def sgd(leaves: Any, *, momentum: float, nesterov: bool) -> optax.GradientTransformation:
    """The gradient g, or its running sum m = momentum * m + g (nesterov: momentum * m + g)."""
    del leaves
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


def muon(
    leaves: Any, *, beta: float, ns_steps: int, adam_learning_rate: float
) -> optax.GradientTransformation:
    """Muon (Jordan et al.

    2024): the momentum of a matrix, orthogonalised, times 0.2 sqrt(max(rows, columns)).

    That scale (Liu et al. 2025, arXiv:2502.16982) gives the update the size of Adam's, so both
    parts share learning rate and weight decay. For every layer, of a stack too:

        Muon    q, k, v as one matrix [D, H A] each; o as [H A, D]; w_in, dense or expert, as P matrices [D, F] (gate
                and up); w_out as [F, D]; every expert by itself. The table is muon.MATRICES
        Adam    (0.9, 0.95), its rate times `adam_learning_rate`: embed, head, router, norms, biases, and any name that
                the table does not have
    """

    def label(leaf: Leaf) -> str:
        roles = MATRICES.get(leaf.name.rpartition("/")[2])
        return "muon" if roles and leaf.ndim >= len(roles) else "adam"

    directions: dict[Any, Any] = {
        "muon": optax.chain(optax.trace(beta, nesterov=True), orthogonalize(ns_steps)),
        "adam": optax.chain(optax.scale_by_adam(b1=0.9, b2=0.95), optax.scale(adam_learning_rate)),
    }
    return optax.partition(directions, jax.tree.map(label, leaves))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
    "sgd": sgd,
}


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
