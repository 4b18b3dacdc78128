"""Muon (Jordan et al. 2024): the momentum of a matrix, orthogonalised, times
0.2 sqrt(max(rows, columns)).

That scale (Liu et al. 2025, arXiv:2502.16982) gives the update the size of Adam's, so both
parts share learning rate and weight decay. For every layer, of a stack too:

    Muon    q, k, v as one matrix [D, H A] each; o as [H A, D]; w_in, dense or expert, as P matrices
            [D, F] (gate and up); w_out as [F, D]; every expert by itself. The table is
            muon.MATRICES
    Adam    (0.9, 0.95), its rate times `adam_learning_rate`: embed, head, router, norms, biases,
            and any name that the table does not have
"""

import dataclasses
from typing import Any

import jax
import optax

from moe_jax.optim.optimizers.contract import Leaf, Optimizer
from moe_jax.optim.orthogonal import MATRICES, orthogonalize
from moe_jax.schema.options import BELOW_ONE, NOT_NEGATIVE, NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    beta: float = option(0.95, "momentum", BELOW_ONE)
    ns_steps: int = option(5, "Newton-Schulz steps of the orthogonalisation", NUMBER)
    weight_decay: float = option(0.1, "decoupled, times the learning rate", NOT_NEGATIVE)
    adam_learning_rate: float = option(
        1.0, "factor on the learning rate of Adam's part", NOT_NEGATIVE
    )


def direction(leaves: Any, options: Options) -> optax.GradientTransformation:
    """Returns the direction of an update."""

    def label(leaf: Leaf) -> str:
        roles = MATRICES.get(leaf.name.rpartition("/")[2])
        return "muon" if roles and leaf.ndim >= len(roles) else "adam"

    directions: dict[Any, Any] = {
        "muon": optax.chain(
            optax.trace(options.beta, nesterov=True), orthogonalize(options.ns_steps)
        ),
        "adam": optax.chain(
            optax.scale_by_adam(b1=0.9, b2=0.95), optax.scale(options.adam_learning_rate)
        ),
    }
    return optax.partition(directions, jax.tree.map(label, leaves))


OPTIMIZER = Optimizer(Options, direction, squares=("nu",))
