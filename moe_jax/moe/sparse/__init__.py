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
# Keys from the root of the parameters to a layer's experts.
Path = tuple[Any, ...]


def experts_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Matrices]]:
    """Yields (path, {name: weight}) of every layer's experts in nested dicts."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key == EXPERTS:
            # What lies below is weights: a layer's experts have no experts in them.
            yield (*path, key), value
        else:
            yield from experts_of(value, (*path, key))


def begin(cfg: SparseConfig, params: Any, *, stacked: bool) -> tuple[Any, Any]:
    """Returns (parameters with their first zeros, the masks) from first values, drawn or loaded.

    To be jitted. Raises UserError where there are no experts, or none that the pattern fits.
    """
    if cfg.stored.block:
        raise UserError(
            "model.moe.sparse.stored is set: experts stored as blocks can be evaluated and "
            "decoded, but not trained. Start from a "
            "checkpoint of whole matrices (convert compact --format dense)"
        )
    if cfg.dense:
        return params, ()
    layers = dict(experts_of(params))
    if not layers:
        raise UserError(
            f'model.moe.sparse.rule = "{cfg.rule}" is about experts, and this model has none: set '
            'it to "none"'
        )
    rule = RULES[cfg.rule]
    shape = Shaped(PATTERNS[cfg.pattern], cfg.pattern_options)

    def first(layer: Matrices) -> tuple[Matrices, Kept]:
        """Returns the weights and the masks of one layer before the first step."""
        kept = rule.first(layer, shape, cfg.rule_options)
        if rule.project:
            # Before the first step there is no rate: 0 shrinks nothing, and a threshold needs none.
            zero = jnp.float32(0)
            start = Now(step=jnp.int32(0), steps=1, rate=zero, key=zero)
            layer = rule.project(layer, kept, shape, start, cfg.rule_options)
        return layer, kept

    weights, masks = {}, {}
    for path, layer in layers.items():
        is_stacked = layout.is_stacked(path, stacked)
        _refuse_misfit(cfg, path, layer, is_stacked)
        # A stacked layer is treated repeat by repeat, as a loop over layers would.
        weights[path], kept = layout.per_layer(first, is_stacked)(layer)
        # A rule that acts on the weights alone keeps nothing.
        if kept:
            masks[path] = kept
    mask_tree = nested(masks)
    return mask(replaced(params, weights), mask_tree), mask_tree


def advance(
    cfg: SparseConfig, now: Now, grads: Any, params: Any, masks: dict[str, Any], *, stacked: bool
) -> tuple[Any, dict[str, Any]]:
    """Returns (parameters, masks) after the optimizer's update made `params`.

    `grads` are the dense gradients. `now.key` is the step's.
    """
    rule = RULES[cfg.rule]
    shape = Shaped(PATTERNS[cfg.pattern], cfg.pattern_options)
    # By the old masks first: an update may be dense where gradients and moments are not (Muon's is
    # a product of matrices), and what comes anew begins at 0.
    params = mask(params, masks)
    if rule.update and rule.due:

        def change(masks: dict[str, Any]) -> dict[str, Any]:
            return _changed_masks(cfg, now, shape, params, masks, grads, stacked)

        def keep(masks: dict[str, Any]) -> dict[str, Any]:
            return masks

        # Mostly nothing is due, and the sorts of `change` are skipped.
        masks = jax.lax.cond(rule.due(now, cfg.rule_options), change, keep, masks)
    if rule.project:
        params = _projected(cfg, now, shape, params, masks, stacked)
    return mask(params, masks), masks


def _projected(
    cfg: SparseConfig, now: Now, shape: Shaped, params: Any, masks: dict[str, Any], stacked: bool
) -> Any:
    """Returns the parameters after a rule acted on the weights themselves."""
    project: Any = RULES[cfg.rule].project

    def of_layer(layer: Matrices, kept: Kept) -> Matrices:
        return project(layer, kept, shape, now, cfg.rule_options)

    kept_of = dict(experts_of(masks))
    projected = {}
    for path, layer in experts_of(params):
        run = layout.per_layer(of_layer, layout.is_stacked(path, stacked))
        projected[path] = run(layer, kept_of.get(path, {}))
    return replaced(params, projected)


def _changed_masks(
    cfg: SparseConfig, now: Now, shape: Shaped, params: Any, masks: Any, grads: Any, stacked: bool
) -> Any:
    """Returns the masks that a rule makes of the weights and their dense gradients."""
    update: Any = RULES[cfg.rule].update
    masks_of = dict(experts_of(masks))
    grads_of = dict(experts_of(grads))
    changed = {}
    for path, layer in experts_of(params):
        # One key for each layer and repeat, the same for the loop and the scan.
        path_hash, repeat = identity(path)
        path_key = jax.random.fold_in(now.key, path_hash)

        def of_layer(
            repeat: Any, layer: Matrices, kept: Kept, grad: Matrices, path_key: Any = path_key
        ) -> Kept:
            # Of the step, the layer and the repeat, and of nothing that a mesh changes.
            layer_now = now._replace(key=jax.random.fold_in(path_key, repeat))
            return update(layer, kept, grad, shape, layer_now, cfg.rule_options)

        is_stacked = layout.is_stacked(path, stacked)
        if is_stacked:
            # Stacked layers are numbered along their leading axis.
            repeat = jnp.arange(jax.tree.leaves(layer)[0].shape[0])
        run = layout.per_layer(of_layer, is_stacked)
        changed[path] = run(repeat, layer, masks_of[path], grads_of[path])
    return nested(changed)


def _is_mask(kept: Any) -> bool:
    """Returns whether what a rule keeps of a matrix is a mask, and not a threshold."""
    return kept.dtype == bool


def mask(tree: Any, masks: dict[str, Any]) -> Any:
    """Returns the tree with exact zeros where the masks say so.

    It is the parameters, or shaped like them.
    """
    layers = dict(experts_of(tree))
    masked = {}
    for path, kept in experts_of(masks):
        masked[path] = dict(layers[path])
        for name, keep in kept.items():
            # A rule may keep thresholds under the same names; they hide nothing.
            if name in layers[path] and _is_mask(keep):
                masked[path][name] = _zero_outside(keep, layers[path][name])
    return replaced(tree, masked)


def _zero_outside(keep: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the array with exact zeros where the mask is False."""
    return jnp.where(keep, x, jnp.zeros_like(x))


def mask_moments(opt_state: Any, masks: dict[str, Any]) -> Any:
    """Returns an optimizer's state with zeros at masked entries.

    They are in every array that lies below a weight's own path and has its shape. Factored
    statistics (Adafactor's, per row and column) have no such entries, and need none: masked
    gradients add nothing to them.
    """
    mask_of = {}
    for path, kept in experts_of(masks):
        for name, keep in kept.items():
            # A threshold hides nothing.
            if _is_mask(keep):
                mask_of[*path, name] = keep

    def masked(path: Any, x: Any) -> Any:
        keys = tuple(_plain_key(key) for key in path)
        for weight_path, keep in mask_of.items():
            # The path of a moment is that of its weight, with keys of the optimizer before and
            # behind.
            if keep.shape == x.shape and _has_run(keys, weight_path):
                return _zero_outside(keep, x)
        return x

    return jax.tree_util.tree_map_with_path(masked, opt_state)


def _plain_key(key: Any) -> Any:
    """Returns the key, name or index of an entry of a jax key path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return None


def _has_run(keys: Path, run: Path) -> bool:
    """Returns whether `run` stands somewhere in `keys`, its parts one after another."""
    starts = range(len(keys) - len(run) + 1)
    return any(keys[start : start + len(run)] == run for start in starts)


def alive(cfg: SparseConfig, params: Any, masks: dict[str, Any]) -> dict[str, Any]:
    """Returns the masks; for rules without any, where the experts are not zero."""
    if RULES[cfg.rule].project is None:
        return masks
    layers = experts_of(params)
    return nested({path: {name: x != 0 for name, x in layer.items()} for path, layer in layers})


def density(params: Any) -> jax.Array:
    """Returns the fraction of the experts' entries that are not zero."""
    weights = [x for _, layer in experts_of(params) for x in layer.values()]
    # In float32: an int32 is too small for the entries of a large model.
    num_alive = jnp.stack([(x != 0).sum(dtype=jnp.float32) for x in weights]).sum()
    return num_alive / sum(x.size for x in weights)


def identity(path: Path) -> tuple[int, int]:
    """Returns (a hash of the layer's keys without its repeat, the repeat).

    The layer's randomness is of these, the same for the loop and the scan.
    """
    keys, repeat = layout.without_repeat(path)
    return zlib.crc32("/".join(map(str, keys)).encode()), repeat


def nested(layers: dict[Path, Any]) -> dict[str, Any]:
    """Returns {path: value} as nested dicts."""
    tree: dict[Any, Any] = {}
    for path, value in layers.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def replaced(tree: Any, layers: dict[Path, Any]) -> Any:
    """Returns the tree with other values at some paths; no array is copied."""

    def rebuilt(node: Any, path: Path) -> Any:
        if path in layers:
            return layers[path]
        if not isinstance(node, dict):
            return node
        return {key: rebuilt(value, (*path, key)) for key, value in node.items()}

    return rebuilt(tree, ())


def _refuse_misfit(cfg: SparseConfig, path: Path, layer: Matrices, stacked: bool) -> None:
    """Raises UserError where the experts' weights have not the dimensions of the pattern."""
    # Without the leading axis of repeats.
    dims = {name: x.ndim - stacked for name, x in layer.items()}
    if what := PATTERNS[cfg.pattern].misfit(dims):
        raise UserError(
            f'model.moe.sparse.pattern = "{cfg.pattern}" does not fit {"/".join(map(str, path))}: '
            f"{what}: set it to unstructured"
        )
