"""Sparse weights inside experts: what is zero together (patterns/), who decides it (rules/),
and what a training step does (here).

Parameters hold exact zeros, so the model needs no masks, and `jax.grad` gives dense gradients,
which RigL grows by. The masks are in the state of the run beside the parameters, shaped and placed
like the experts' weights: {"experts": {"w_in": bool [E, D, P, F], ...}} below the same keys. A
layer is whatever lies below a key "experts"; with scan, layers are stacked and treated one by one.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import layout
from moe_jax.errors import UserError
from moe_jax.moe.sparse.patterns import PATTERNS
from moe_jax.moe.sparse.patterns.contract import Matrices, Shaped
from moe_jax.moe.sparse.refusals import refusals
from moe_jax.moe.sparse.rules import RULES
from moe_jax.moe.sparse.rules.contract import Kept, Now
from moe_jax.schema.config import SparseConfig

__all__ = [
    "PATTERNS",
    "RULES",
    "Now",
    "advance",
    "begin",
    "density",
    "experts_of",
    "mask",
    "mask_moments",
    "refusals",
]

EXPERTS = "experts"
Path = tuple[Any, ...]  # keys from the root of the parameters to a layer's experts


def experts_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Matrices]]:
    """(path, {name: weight}) of every layer's experts in nested dicts."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == EXPERTS:
                yield (*path, key), value
            else:
                yield from experts_of(value, (*path, key))


def begin(cfg: SparseConfig, params: Any, *, stacked: bool) -> tuple[Any, Any]:
    """(parameters with their first zeros, the masks) from first values, drawn or loaded.

    To be jitted.

    Raises UserError where there are no experts, or none that the pattern fits.
    """
    if cfg.stored.block:
        raise UserError(
            "model.moe.sparse.stored is set: experts stored as blocks can be evaluated and "
            "decoded, but not trained. Start from a "
            "checkpoint of whole matrices (convert compact --format dense)"
        )
    if cfg.dense:
        return params, ()
    if not any(True for _ in experts_of(params)):
        raise UserError(
            f'model.moe.sparse.rule = "{cfg.rule}" is about experts, and this model has none: set '
            'it to "none"'
        )
    rule, shape = RULES[cfg.rule], Shaped(PATTERNS[cfg.pattern], cfg.pattern_options)
    nothing = jnp.float32(0)

    def first(layer: Matrices) -> tuple[Matrices, Kept]:
        kept = rule.first(layer, shape, cfg.rule_options)
        if rule.project:
            layer = rule.project(
                layer, kept, shape, Now(jnp.int32(0), 1, nothing, nothing), cfg.rule_options
            )
        return layer, kept

    done = {}
    for path, layer in experts_of(params):
        many = layout.is_stacked(path, stacked)
        _refuse_misfit(cfg, path, layer, many)
        done[path] = layout.per_layer(first, many)(layer)
    masks = nested({path: kept for path, (_, kept) in done.items() if kept})
    return mask(replaced(params, {path: layer for path, (layer, _) in done.items()}), masks), masks


def advance(
    cfg: SparseConfig, now: Now, grads: Any, params: Any, masks: dict[str, Any], *, stacked: bool
) -> tuple[Any, dict[str, Any]]:
    """(parameters, masks) after the optimizer's update made `params`; `grads` are the dense
    gradients. `now.key` is the step's.
    """
    rule, shape = RULES[cfg.rule], Shaped(PATTERNS[cfg.pattern], cfg.pattern_options)
    if rule.update and rule.due:

        def changed(masks):
            return _changed(cfg, now, shape, mask(params, masks), masks, grads, stacked)

        masks = jax.lax.cond(rule.due(now, cfg.rule_options), changed, lambda masks: masks, masks)
    if rule.project:
        kept = dict(experts_of(masks))
        done = {}
        for path, layer in experts_of(params):

            def project(layer, kept):
                return rule.project(layer, kept, shape, now, cfg.rule_options)

            run = layout.per_layer(project, layout.is_stacked(path, stacked))
            done[path] = run(layer, kept.get(path, {}))
        params = replaced(params, done)
    return mask(params, masks), masks


def _changed(
    cfg: SparseConfig, now: Now, shape: Shaped, params: Any, masks: Any, grads: Any, stacked: bool
) -> Any:
    before, gradients, done = dict(experts_of(masks)), dict(experts_of(grads)), {}
    update: Any = RULES[cfg.rule].update
    for path, layer in experts_of(params):
        key, number = identity(path)
        key = jax.random.fold_in(now.key, key)

        def one(number, layer, kept, grad, key=key):
            return update(
                layer,
                kept,
                grad,
                shape,
                now._replace(key=jax.random.fold_in(key, number)),
                cfg.rule_options,
            )

        many = layout.is_stacked(path, stacked)
        if many:
            number = jnp.arange(jax.tree.leaves(layer)[0].shape[0])
        done[path] = layout.per_layer(one, many)(number, layer, before[path], gradients[path])
    return nested(done)


def mask(tree: Any, masks: dict[str, Any]) -> Any:
    """The tree (parameters, or shaped like them) with exact zeros where the masks say so."""
    layers = dict(experts_of(tree))

    def zero(keep, x):
        return jnp.where(keep, x, jnp.zeros_like(x)) if keep.dtype == bool else x

    done = {
        path: {name: zero(kept[name], x) if name in kept else x for name, x in layers[path].items()}
        for path, kept in experts_of(masks)
    }
    return replaced(tree, done)


def mask_moments(opt_state: Any, masks: dict[str, Any]) -> Any:
    """An optimizer's state with zeros at masked entries: in every array that lies below a weight's
    own path and has its shape.

    Factored statistics (Adafactor's, per row and column) have no such entries, and need none:
    masked gradients add nothing to them.
    """
    flat = {
        (*path, name): keep
        for path, kept in experts_of(masks)
        for name, keep in kept.items()
        if keep.dtype == bool
    }

    def one(path: Any, x: Any) -> Any:
        keys = tuple(
            getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path
        )
        for weight, keep in flat.items():
            places = range(len(keys) - len(weight) + 1)
            if keep.shape == x.shape and any(keys[i : i + len(weight)] == weight for i in places):
                return jnp.where(keep, x, jnp.zeros_like(x))
        return x

    return jax.tree_util.tree_map_with_path(one, opt_state)


def alive(cfg: SparseConfig, params: Any, masks: dict[str, Any]) -> dict[str, Any]:
    """The masks; for rules without any, where the experts are not zero."""
    if RULES[cfg.rule].project is None:
        return masks
    return nested(
        {path: {name: x != 0 for name, x in layer.items()} for path, layer in experts_of(params)}
    )


def density(params: Any) -> jax.Array:
    """The fraction of the experts' entries that are not zero."""
    weights = [x for _, layer in experts_of(params) for x in layer.values()]
    alive = jnp.stack([(x != 0).sum(dtype=jnp.float32) for x in weights]).sum()
    return alive / sum(x.size for x in weights)


def identity(path: Path) -> tuple[int, int]:
    """Returns (a hash of the layer's keys without its repeat, the repeat): what the layer's
    randomness is of, the same for the loop and the scan.
    """
    keys, repeat = layout.without_repeat(path)
    return zlib.crc32("/".join(map(str, keys)).encode()), repeat


def nested(layers: dict[Path, Any]) -> dict[str, Any]:
    """{path: value} as nested dicts."""
    tree: dict[Any, Any] = {}
    for path, value in layers.items():
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
    return tree


def replaced(tree: Any, layers: dict[Path, Any]) -> Any:
    """The tree with other values at some paths; no array is copied."""

    def rebuild(node: Any, path: Path) -> Any:
        if path in layers:
            return layers[path]
        return (
            {k: rebuild(v, (*path, k)) for k, v in node.items()} if isinstance(node, dict) else node
        )

    return rebuild(tree, ())


def _refuse_misfit(cfg: SparseConfig, path: Path, layer: Matrices, stacked: bool) -> None:
    dims = {name: x.ndim - stacked for name, x in layer.items()}
    if what := PATTERNS[cfg.pattern].misfit(dims):
        raise UserError(
            f'model.moe.sparse.pattern = "{cfg.pattern}" does not fit {"/".join(map(str, path))}: '
            f"{what}: set it to unstructured"
        )
