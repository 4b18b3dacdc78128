"""Rules: which entries of the experts are zero, from the first step to the last.

A new one is its functions and a line in RULES.

A rule either keeps masks (`update` makes new ones; entries outside stay exactly zero, and so do
their moments), or acts on the weights after every update of the optimizer (`project`; what it makes
zero may come back). All work on the experts of one layer, {name: [E, I, ..., O]}, with a pattern
that says what is zero together; a group's magnitude is the root mean square of its entries.

rule          what is zero                                                    paper
static        for ever what is smallest in the random first values            the article "why sparse experts", section 3.2
threshold     after each update what is below a magnitude; may come back      the same, section 3.3 (`sparse_update`)
magnitude     the smallest; the density falls as a cubic                      Zhu & Gupta 2017, arXiv:1710.01878
set           the smallest go, random ones come                               Mocanu et al. 2018, arXiv:1707.04780
rigl          the smallest go, those with the largest dense gradient come     Evci et al. 2020, arXiv:1911.11134
group_lasso   hidden units, by the proximal step of their norms' sum          Scardapane et al. 2017, arXiv:1607.00485
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.sparse.patterns import Matrices, Shaped, largest

Options = Mapping[str, Any]
Kept = dict[
    str, jax.Array
]  # what a rule keeps from step to step: masks by matrix, or thresholds by key of groups


class Now(NamedTuple):
    """The moment of an update."""

    step: jax.Array  # updates done, this one included
    steps: int  # of the whole training
    rate: jax.Array  # learning rate of this update
    key: jax.Array  # randomness of this update (in `update`: of this layer's part of it)


class Rule(NamedTuple):
    """One line of RULES."""

    first: Callable[[Matrices, Shaped, Options], Kept]  # from the first values
    due: Callable[[Now, Options], jax.Array] | None  # do masks change now?
    update: (
        Callable[[Matrices, Kept, Matrices, Shaped, Now, Options], Kept] | None
    )  # (weights, masks, dense gradients)
    project: (
        Callable[[Matrices, Kept, Shaped, Now, Options], Matrices] | None
    )  # weights after the optimizer's update


def first_masks(experts: Matrices, shape: Shaped, options: Options) -> Kept:
    """W = random; W[|W| < threshold] = 0, and later only non-zero entries move (the article,
    section 3.1 and 3.2).

    The entries of the largest groups; with options["threshold"] > 0 those of the groups of at least
    that magnitude.
    """
    scores = shape.norms(experts)
    if options.get("threshold", 0):
        return shape.spread({key: z >= options["threshold"] for key, z in scores.items()}, experts)
    return shape.spread(shape.choose(scores, shape.kept), experts)


def all_masks(experts: Matrices, shape: Shaped, options: Options) -> Kept:
    return {name: jnp.ones_like(x, dtype=bool) for name, x in experts.items()}


# The article's


def first_thresholds(experts: Matrices, shape: Shaped, options: Options) -> Kept:
    """Nothing for a given threshold; else, for every expert, the magnitude that leaves the
    pattern's density of its first values [E].
    """
    if options["threshold"]:
        return {}
    scores = shape.norms(experts)

    def least(z: jax.Array) -> jax.Array:
        number = math.prod(z.shape[1:])
        chosen = largest(z, shape.pattern.count(shape.options, number), 1)
        return jnp.where(chosen, z, jnp.inf).min(tuple(range(1, z.ndim)))

    return {key: least(z) for key, z in scores.items()}


def below_to_zero(
    experts: Matrices, kept: Kept, shape: Shaped, now: Now, options: Options
) -> Matrices:
    """W[|W| < threshold] = 0.

    An entry comes back when a single update moves it by at least the threshold.
    """
    scores = shape.norms(experts)

    def threshold(key, z):
        return options["threshold"] or kept[key].reshape(-1, *[1] * (z.ndim - 1))

    alive = shape.spread({key: z >= threshold(key, z) for key, z in scores.items()}, experts)
    return {name: jnp.where(alive[name], x, jnp.zeros_like(x)) for name, x in experts.items()}


# Pruning


def cubic_density(now: Now, options: Options, final: float) -> jax.Array:
    """1 - s_f + s_f (1 - (t - t_0) / (t_1 - t_0))^3, final = 1 - s_f (equation 1 of the paper, from
    sparsity 0).
    """
    begin, end = _span(now, options)
    t = jnp.clip((now.step - begin) / max(end - begin, 1), 0.0, 1.0)
    return final + (1 - final) * (1 - t) ** 3


def magnitude_due(now: Now, options: Options) -> jax.Array:
    begin, end = _span(now, options)
    return (
        (now.step >= begin)
        & (now.step <= end)
        & ((now.step % options["every"] == 0) | (now.step == end))
    )


def magnitude_update(
    experts: Matrices, masks: Kept, grads: Matrices, shape: Shaped, now: Now, options: Options
) -> Kept:
    """What is pruned is zero, so it is the smallest and stays pruned."""

    def count(groups: jax.Array) -> jax.Array:
        number, kept = shape.row_size(groups), shape.kept(groups)
        density = cubic_density(now, options, kept / number)
        return jnp.maximum(jnp.round(density * number).astype(jnp.int32), kept)

    return shape.spread(shape.choose(shape.norms(experts), count), experts)


# Regrowth at constant density


def set_fraction(now: Now, options: Options) -> jax.Array:
    return jnp.asarray(options["fraction"], jnp.float32)


def rigl_fraction(now: Now, options: Options) -> jax.Array:
    """alpha / 2 (1 + cos(pi t / T_end)) (section 3, "update schedule")."""
    t = jnp.clip(now.step / _span(now, options)[1], 0.0, 1.0)
    return options["fraction"] / 2 * (1 + jnp.cos(jnp.pi * t))


def regrowth_due(now: Now, options: Options) -> jax.Array:
    return (now.step < _span(now, options)[1]) & (now.step % options["every"] == 0)


def set_update(
    experts: Matrices, masks: Kept, grads: Matrices, shape: Shaped, now: Now, options: Options
) -> Kept:
    scores = shape.norms(experts)
    keys = jax.random.split(now.key, len(scores))
    draw = {
        key: jax.random.uniform(k, scores[key].shape)
        for key, k in zip(sorted(scores), keys, strict=True)
    }
    return regrow(experts, masks, draw, shape, set_fraction(now, options))


def rigl_update(
    experts: Matrices, masks: Kept, grads: Matrices, shape: Shaped, now: Now, options: Options
) -> Kept:
    return regrow(experts, masks, shape.norms(grads), shape, rigl_fraction(now, options))


def regrow(
    experts: Matrices, masks: Kept, growth: Kept, shape: Shaped, fraction: jax.Array
) -> Kept:
    """Of the k live groups of every row the `fraction` k of the least magnitude go, and as many
    come with the largest `growth`.

    Those that just went may come back, as in the paper of RigL (algorithm 1); they keep their value
    then. All others come at 0.
    """
    live = {
        key: z > 0
        for key, z in shape.pool({n: m.astype(jnp.float32) for n, m in masks.items()}).items()
    }

    def leave(z):
        return jnp.round(fraction * shape.kept(z)).astype(jnp.int32)

    magnitude = {key: jnp.where(live[key], z, -1) for key, z in shape.norms(experts).items()}
    stay = shape.choose(magnitude, lambda z: shape.kept(z) - leave(z))
    growth = {key: jnp.where(stay[key], -1, growth[key]) for key in stay}
    grown = shape.choose(growth, leave)
    return shape.spread({key: stay[key] | grown[key] for key in stay}, experts)


# Group lasso


def shrink_units(
    experts: Matrices, kept: Kept, shape: Shaped, now: Now, options: Options
) -> Matrices:
    """w <- max(0, 1 - rate * lambda * sqrt(n) / |w|) w for every unit w of n entries: the proximal
    step of lambda sqrt(n) |w|.

    The step size is the learning rate, also under optimizers that scale every entry's update on its
    own: then lambda means what it does for weight decay there (decoupled), and the zeros are as
    exact.
    """

    def factor(rms: jax.Array) -> jax.Array:  # |w| / sqrt(n) is the root mean square
        cut = now.rate * options["strength"]
        return jnp.where(rms > cut, 1 - cut / jnp.where(rms > cut, rms, 1), 0)

    factors = {key: factor(z) for key, z in shape.norms(experts).items()}
    spread = shape.spread(factors, experts)

    def scale(x, factor):
        return jnp.where(factor > 0, x * factor.astype(x.dtype), jnp.zeros_like(x))  # 0, not -0

    return {name: scale(x, spread[name]) for name, x in experts.items()}


def _span(now: Now, options: Options) -> tuple[int, int]:
    """The first and the last step of changes, from fractions of the training."""
    return round(options.get("begin", 0.0) * now.steps), max(1, round(options["end"] * now.steps))


RULES: dict[str, Rule] = {
    "static": Rule(first_masks, None, None, None),
    "threshold": Rule(first_thresholds, None, None, below_to_zero),
    "magnitude": Rule(all_masks, magnitude_due, magnitude_update, None),
    "set": Rule(first_masks, regrowth_due, set_update, None),
    "rigl": Rule(first_masks, regrowth_due, rigl_update, None),
    "group_lasso": Rule(lambda experts, shape, options: {}, None, None, shrink_units),
}
