"""From a config to one gradient transformation: `clip -> direction -> decay -> rate`.

The gradient is clipped by its global norm; the chosen optimizer makes a direction of it
(OPTIMIZERS); weight_decay * parameter is added where the mask allows (decoupled, Loshchilov &
Hutter 2019, arXiv:1711.05101); all of it is scaled by the learning rate (SCHEDULES). Clipping,
decay and schedule are therefore the same for every optimizer.

All of it happens in float32 or wider, moments included, whatever the parameters and their gradients
are kept in.

Everything runs inside jit on an Explicit mesh; moments have the sharding of their parameters, which
are nested dicts. A model built with scan stacks the layers of its "repeats" over a leading axis;
every optimizer treats each layer of a stack as it would the layer alone, so the loop and the scan
train alike.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax import layout
from moe_jax.errors import UserError
from moe_jax.names import name_of
from moe_jax.optim.optimizers import OPTIMIZERS
from moe_jax.optim.optimizers.contract import Leaf
from moe_jax.optim.schedules import SCHEDULES, rate
from moe_jax.precision import wide_dtype
from moe_jax.schema.training import OptimConfig

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "clip",
    "decay_mask",
    "global_norm",
    "make",
    "norms",
    "rate",
    "squares",
]
__all__ += ["begin_ema", "narrow_copy", "update_ema", "wide_copy"]


def squares(tree: Any) -> jax.Array:
    """Returns the sum of squares of every leaf, in float32 or wider.

    They come in the order of `jax.tree.leaves`.
    """

    return jnp.stack([jnp.square(_wide(x)).sum() for x in jax.tree.leaves(tree)])


def global_norm(tree: Any) -> jax.Array:
    """Returns the root of the sum of squares of all leaves, in float32 or wider."""
    return jnp.sqrt(squares(tree).sum())


def copied(params: Any) -> Any:
    """Returns a copy of parameters for `norms`: a step takes its state away."""
    return jax.tree.map(jnp.copy, params)


def norms(new: Any, old: Any) -> dict[str, jax.Array]:
    """Returns what is logged of parameters that a step has changed: their norm, and |new - old|.

    They are taken beside the step, of logged steps alone: each is one more pass over all
    parameters. Taken of the updates inside the step, the second would make XLA's CPU compiler write
    every one of them out: 1.5 times the time of an AdamW update, measured at 104 M parameters.
    """
    update = jax.tree.map(jnp.subtract, new, old)
    return {"param_norm": global_norm(new), "update_norm": global_norm(update)}


def clip(limit: float) -> optax.GradientTransformation:
    """Returns optax.clip_by_global_norm as one product, which XLA fuses into what follows."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        norm = global_norm(updates)
        # A norm that is NaN is not below the limit, so the updates become NaN, too. The step tells
        # of it by the gradients (train_step.py).
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make(cfg: OptimConfig, params: Any, *, stacked: bool) -> optax.GradientTransformation:
    """Returns the gradient transformation of a config.

    Args:
      cfg: the chosen optimizer and schedule, with the options of both.
      params: the parameters or their abstract values; only names and shapes are read.
      stacked: layers below a key "repeats" are stacked over a leading axis (the model was built
          with scan).

    Returns:
      A transformation whose state is {"clip", "direction", "decay", "rate"}; `rate` counts the
      updates made: the step.

    Raises UserError for a name or an option that does not exist.
    """
    # Names and shapes decide what is a matrix, what decays and what moves.
    leaves = describe(params, stacked)
    direction = OPTIMIZERS[cfg.optimizer].direction(leaves, cfg.options)
    decayed = decay_mask(cfg.decay_mask, leaves)
    clipped = clip(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    scaled = optax.scale_by_learning_rate(rate(cfg))
    if cfg.train_only:
        # Before the clip: what does not move has no part in the norm, and its moments stay zero.
        # After the rate: weight decay does not move it either.
        only = moving(cfg.train_only, leaves)
        clipped = optax.chain(only, clipped)
        scaled = optax.chain(scaled, only)
    chain = optax.named_chain(
        # The state of the chain is a dict of these names, which are those in a checkpoint.
        ("clip", clipped),
        ("direction", direction),
        ("decay", optax.add_decayed_weights(cfg.options.weight_decay, decayed)),
        ("rate", scaled),
    )
    return in_float32(chain)


def moving(pattern: str, leaves: Any) -> optax.GradientTransformation:
    """Returns zero for all parameters but those in whose names the regular expression is found.

    Raises UserError if there are none.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f'optim.train_only = "{pattern}" is no regular expression: {error}'
        ) from None
    moves = jax.tree.map(lambda leaf: bool(expression.search(leaf.name)), leaves)
    if not any(jax.tree.leaves(moves)):
        names = [leaf.name for leaf in jax.tree.leaves(leaves)]
        raise UserError(
            f'optim.train_only = "{pattern}" is found in no name of a parameter: '
            f"{_names(pattern, names)}"
        )

    def keep(updates):
        return jax.tree.map(lambda g, move: g if move else jnp.zeros_like(g), updates, moves)

    return optax.stateless(lambda updates, params: keep(updates))


def _names(pattern: str, names: Sequence[str]) -> str:
    """Returns what a message says of the names of the parameters.

    Those that have a word of the pattern come first; layers of a stack stand once, as N.
    """
    # Without the signs of a regular expression: the words that a user meant.
    words = re.findall(r"[A-Za-z_]{2,}", pattern)
    kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "N", name) for name in names))
    near = [kind for kind in kinds if any(word in kind for word in words)]
    meant = f"did you mean {' or '.join(near[:3])}? " if near else ""
    return f"{meant}they are {', '.join(kinds)} (N a number)"


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `inner` on float32 (or wider) gradients and parameters.

    So its moments and its updates are, too.
    """
    # In bfloat16 a moment that decays by less than 1/512 a step (b2 = 0.999) would never fall: each
    # step is rounded away.

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(_wide, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return inner.update(jax.tree.map(_wide, updates), state, jax.tree.map(_wide, params))

    return optax.GradientTransformation(init, update)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(wide_dtype(x.dtype))


def wide_copy(params: Any) -> Any:
    """Returns the parameters in float32 or wider, in arrays of their own: both may be donated."""
    return jax.tree.map(lambda x: jnp.array(x, wide_dtype(x.dtype)), params)


def narrow_copy(wide: Any, params: Any) -> Any:
    """Returns `wide` in the dtypes of `params`, rounded to the nearest, in arrays of its own."""
    return jax.tree.map(lambda w, x: jnp.array(w, x.dtype), wide, params)


def begin_ema(params: Any) -> Any:
    """Returns the moving average before the first step, in float32 or wider."""
    # In bfloat16 steps below 1/256 of a weight would be lost.
    return wide_copy(params)


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """Returns the moving average after one more step: decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda e, x: decay * e + (1.0 - decay) * x.astype(e.dtype), ema, params)


def decay_mask(which: str, leaves: Any) -> Any:
    """Returns a tree of booleans: what decays.

    "matrices": two dimensions or more, and neither a norm's scale nor a bias.
    """
    masks = {"matrices": _is_matrix, "all": lambda leaf: True, "none": lambda leaf: False}
    if which not in masks:
        raise UserError(
            f'optim.decay_mask = "{which}" is not known: choose one of {", ".join(masks)}'
        )
    return jax.tree.map(masks[which], leaves)


def describe(params: Any, stacked: bool) -> Any:
    """Returns a tree of `Leaf`, one for each parameter."""

    def leaf(path: Any, x: Any) -> Leaf:
        name = name_of(path)
        # A bias of a stack is a vector of each layer, although its array has two dimensions.
        is_stacked = layout.is_stacked(name.split("/"), stacked)
        return Leaf(name, ndim=len(x.shape) - is_stacked, stacked=is_stacked)

    return jax.tree_util.tree_map_with_path(leaf, params)


def _is_matrix(leaf: Leaf) -> bool:
    """Returns whether a parameter is multiplied with activations: no norm's scale, no bias."""
    parts = leaf.name.split("/")
    last = parts[-1]
    is_of_norm = last == "scale" or any("norm" in part for part in parts)
    return leaf.ndim >= 2 and not is_of_norm and "bias" not in last
