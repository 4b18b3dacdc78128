"""The inputs that a foreign layer is tried on, in NumPy, the same on every mesh.

Shapes as in contract.py.
"""

from typing import NamedTuple

import numpy as np

from moe_jax.verify.foreign import arithmetic
from moe_jax.verify.foreign.contract import GIVEN, Inputs, Layer, Sizes

# Added to the logit of an expert that a case wants to be chosen, taken from the others'. Scores
# that are farther apart would leave no gradient.
PULL = 4.0
# Of so many times the tokens those are kept whose choice is the clearest: in float32 no rounding
# flips it.
DRAWN = 4
# What padding holds is larger than tokens, so that none of it goes unseen.
PADDING = 30.0


class Case(NamedTuple):
    """One set of inputs."""

    claim: str
    inputs: Inputs
    # The gradient of the output, 0 for padding.
    dy_TD: np.ndarray


def cases(layer: Layer, sizes: Sizes, seed: int) -> list[Case]:
    """Returns the inputs that a layer is tried on."""
    rng = np.random.default_rng(seed)
    base = draw(rng, layer, sizes, np.zeros(sizes.experts))
    order_T, order_E = rng.permutation(sizes.tokens), rng.permutation(sizes.experts)
    same_E = np.where(np.arange(sizes.experts) >= sizes.experts - layer.k, PULL, -PULL)
    half_E = np.where(np.arange(sizes.experts) % 2 == 1, PULL, -PULL)
    made = [
        Case("random tokens", *base),
        Case("the same tokens in another order", *tokens_in(order_T, *base)),
        Case("the same experts in another order", *experts_in(order_E, *base)),
        Case("all tokens go to the last experts", *draw(rng, layer, sizes, same_E)),
    ]
    # With fewer experts than choices in a half, the choices would be those of rounding.
    if sizes.experts // 2 >= layer.k:
        made.append(Case("every other expert serves nobody", *draw(rng, layer, sizes, half_E)))
    if layer.masks:
        made.append(Case("padding between the tokens", *padded(*base)))
    return made


def draw(
    rng: np.random.Generator, layer: Layer, sizes: Sizes, pull_E: np.ndarray
) -> tuple[Inputs, np.ndarray]:
    """Returns (inputs, dy) with random tokens, whose logits are `pull_E` larger."""
    T, D, E, F = sizes
    x_ND = rng.normal(size=(DRAWN * T, D))
    # The last column is 1, and so the last row of the router is a bias.
    x_ND[:, -1] = 1.0
    router_DE = rng.normal(size=(D, E)) / np.sqrt(D)
    router_DE[-1] += pull_E
    logits_NE = x_ND @ router_DE
    # The distances between the first choices, and to the first that is not chosen.
    falling_NE = -np.sort(-logits_NE, axis=1)
    margin_N = (falling_NE[:, : layer.k] - falling_NE[:, 1 : layer.k + 1]).min(1)
    kept_T = np.sort(np.argsort(-margin_N)[:T])
    x_TD, logits_TE = x_ND[kept_T], logits_NE[kept_T]
    expert_TK, gate_TK = arithmetic.choose(logits_TE, layer)
    inputs = Inputs(
        x_TD=x_TD,
        router_DE=router_DE,
        logits_TE=logits_TE,
        expert_TK=expert_TK,
        gate_TK=gate_TK,
        w_gate_EDF=rng.normal(size=(E, D, F)) / np.sqrt(D),
        w_up_EDF=rng.normal(size=(E, D, F)) / np.sqrt(D),
        w_down_EFD=rng.normal(size=(E, F, D)) / np.sqrt(F),
        valid_T=np.ones(T, bool),
    )
    return asked(inputs, layer), rng.normal(size=(T, D))


def asked(inputs: Inputs, layer: Layer) -> Inputs:
    """Returns the inputs without what the layer did not ask for."""
    without = {name for names in GIVEN.values() for name in names} - set(GIVEN[layer.given])
    if layer.activation != "swiglu":
        without.add("w_gate_EDF")
    return inputs._replace(**dict.fromkeys(without))


def tokens_in(order_T: np.ndarray, inputs: Inputs, dy_TD: np.ndarray) -> tuple[Inputs, np.ndarray]:
    """Returns (inputs, dy) with the tokens in another order."""
    moved = {
        name: value[order_T]
        for name, value in inputs._asdict().items()
        if value is not None and name.rpartition("_")[2].startswith("T")
    }
    return inputs._replace(**moved), dy_TD[order_T]


def experts_in(order_E: np.ndarray, inputs: Inputs, dy_TD: np.ndarray) -> tuple[Inputs, np.ndarray]:
    """Returns (inputs, dy) where expert i is what expert order_E[i] was."""
    moved = {}
    for name, value in inputs._asdict().items():
        axis = name.rpartition("_")[2].find("E")
        if value is not None and axis >= 0:
            moved[name] = np.take(value, order_E, axis)
    if inputs.expert_TK is not None:
        moved["expert_TK"] = np.argsort(order_E).astype(np.int32)[inputs.expert_TK]
    return inputs._replace(**moved), dy_TD


def padded(inputs: Inputs, dy_TD: np.ndarray) -> tuple[Inputs, np.ndarray]:
    """Returns (inputs, dy) where every third token is padding, the first among them."""
    valid_T = np.arange(len(dy_TD)) % 3 != 0
    x_TD = np.where(valid_T[:, None], inputs.x_TD, PADDING * inputs.x_TD)
    return inputs._replace(x_TD=x_TD, valid_T=valid_T), np.where(valid_T[:, None], dy_TD, 0.0)
