"""How a model keeps its layers: the only module that stacks and unstacks them and numbers them.

A stack of blocks is `prefix`, then `period` times `repeats`, then `suffix` (schema.blocks.Stack).
The periods lie below the key "repeats" in one of two layouts:

    loop   repeats/2/blocks/0/...   one array per layer
    scan   repeats/blocks/0/...     one array for all repeats, which has a leading axis of them

The loop's names are those on disk, in a certificate and in a metric, whatever the layout of the
model is, so a checkpoint of the one is read by the other. Two numbers exist: of a block, among all
blocks of the model in the order in which they run, and of an MoE layer, among those that have
experts. Both count from 0, an encoder's first.

Shapes: B rows, L MoE layers, n blocks that report a sum.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from moe_jax.parallel import stages
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.blocks import Stack, inner
from moe_jax.schema.config import ModelConfig

# The key below which the periods of a stack lie.
REPEATS = "repeats"
# Of nested dicts, from the root of a tree to an array, or a name split at "/".
Keys = Sequence[Any]


# Names.


def is_stacked(keys: Keys, scan: bool) -> bool:
    """Returns whether the array at `keys` has a leading axis of repeats."""
    return scan and REPEATS in keys


def layer_names(name: str, shape: tuple[int, ...], scan: bool) -> list[str] | None:
    """Returns the loop's names of the layers of a stacked array; None where it is not stacked."""
    parts = name.split("/")
    if not is_stacked(parts, scan):
        return None
    if not shape:
        raise ValueError(
            f'{name} is a scalar below "repeats": a stacked state has a leading axis of layers '
            "there"
        )
    at = parts.index(REPEATS) + 1
    return ["/".join((*parts[:at], str(i), *parts[at:])) for i in range(shape[0])]


def without_repeat(keys: Keys) -> tuple[tuple[Any, ...], int]:
    """Returns the keys that both layouts share, and the repeat: 0 where all repeats are stacked.

    Randomness that is of this pair (and, in a stacked array, of the index along its first axis)
    is the same in both layouts.
    """
    keys = tuple(keys)
    if REPEATS in keys:
        at = keys.index(REPEATS) + 1
        if isinstance(keys[at], int):
            return keys[:at] + keys[at + 1 :], keys[at]
    return keys, 0


# Arrays.


def per_layer(f: Callable[..., Any], stacked: bool) -> Callable[..., Any]:
    """Returns `f`, which works on one layer, for arrays that are stacked or not."""
    if not stacked:
        return f

    def of_layers(*args: Any) -> Any:
        # All over the same stages, or vmap would refuse them.
        split = stages.are_split(args)
        found = jax.vmap(f)(*jax.tree.map(stages.split, args) if split else args)
        return jax.tree.map(stages.split, found) if split else found

    return of_layers


@jax.jit
def layers_of(x: jax.Array) -> list[jax.Array]:
    """Returns the layers of a stacked array, each an array of its own."""
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.empty and any(sharding.spec[:1]):
        # A dimension that is split over devices cannot be indexed.
        x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(None, *sharding.spec[1:])))
    return [x[i] for i in range(x.shape[0])]


def stack_layers(layers: list[jax.Array], sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns one array of all layers; `sharding` is that of the result."""
    return _stacker(sharding)(layers)


def layer_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns the sharding of one layer of a stacked array that has `sharding`."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return sharding


@functools.lru_cache
def _stacker(sharding: jax.sharding.Sharding) -> Any:
    """Returns the compiled stacking for a sharding, made once for each."""
    return jax.jit(jnp.stack, out_shardings=sharding)


# Trees of a whole model: parameters, or the states of its routers.


def unstack(tree: Any, cfg: ModelConfig) -> Any:
    """Returns nested dicts of a model in the layout of the loop, whatever `cfg.scan` says."""
    if not cfg.scan:
        return tree
    out = _unstacked(tree, cfg.stacks[""]) if "" in cfg.stacks else tree
    parts = {name: stack for name, stack in cfg.stacks.items() if name in out}
    return out | {name: _unstacked(out[name], stack) for name, stack in parts.items()}


def _unstacked(tree: Any, stack: Stack) -> Any:
    """Returns a stack of blocks with its repeats one by one, below their numbers."""
    if REPEATS not in tree:
        return dict(tree)
    # Repeats that lie on the stages of a pipeline are gathered first.
    whole = jax.tree.map(stages.whole, tree[REPEATS])

    def layer(i: int) -> Any:
        return jax.tree.map(lambda z: z[i], whole)

    return {**tree, REPEATS: {i: layer(i) for i in range(stack.repeats)}}


def by_moe_layer(tree: Any, cfg: ModelConfig) -> dict[str, jax.Array]:
    """Returns {name: [L, ...]} of a tree whose arrays all belong to MoE layers, by their last key.

    The order of the layers is that of the sums which the model returns.
    """
    parts: dict[str, list[jax.Array]] = {}
    numbers: dict[str, list[np.ndarray]] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, number = path[-1].key, moe_layer_numbers(keys_of(path), cfg)
        x = stages.whole(x)
        parts.setdefault(name, []).append(x if number.ndim else x[None])
        numbers.setdefault(name, []).append(np.atleast_1d(number))
    ordered = {}
    for name in parts:
        # The tree has them in the order of its keys, which is not that of the layers.
        order = np.argsort(np.concatenate(numbers[name]))
        ordered[name] = jnp.concatenate(parts[name])[order]
    return ordered


def into_moe_layers(values: dict[str, jax.Array], tree: Any, cfg: ModelConfig) -> Any:
    """Returns a tree with the structure and dtypes of `tree` from `values` {name: [L, ...]}: the
    inverse of `by_moe_layer`.
    """

    def take(path: Any, x: jax.Array) -> jax.Array:
        taken = values[path[-1].key][moe_layer_numbers(keys_of(path), cfg)].astype(x.dtype)
        return stages.as_split(taken, x)

    return jax.tree_util.tree_map_with_path(take, tree)


# Numbers.


def keys_of(path: Any) -> list[Any]:
    """Returns the keys of a path of jax through nested dicts."""
    return [key.key for key in path]


def block_numbers(keys: Keys, cfg: ModelConfig) -> np.ndarray | None:
    """Returns which blocks the array at `keys` belongs to: one number, or [repeats] of them where
    it is stacked. None for what lies outside of the blocks (embedding, head).
    """
    name = keys[0] if keys[0] in cfg.stacks else ""
    if name not in cfg.stacks:
        return None
    stack, inner = cfg.stacks[name], keys[1:] if name else keys
    # Blocks are numbered through all stacks: those before this one come first.
    before = list(cfg.stacks)[: list(cfg.stacks).index(name)]
    first = sum(len(cfg.stacks[other].blocks) for other in before)
    if inner[0] == "prefix":
        return np.array(first + inner[1])
    first += len(stack.prefix)
    if inner[0] == REPEATS:
        if cfg.scan:
            # ("repeats", "blocks", i, ...): the i-th block of every period.
            return first + np.arange(stack.repeats) * len(stack.period) + inner[2]
        # ("repeats", r, "blocks", i, ...): that of period r alone.
        return np.array(first + inner[1] * len(stack.period) + inner[3])
    if inner[0] == "suffix":
        return np.array(first + stack.repeats * len(stack.period) + inner[1])
    return None


def has_experts(cfg: ModelConfig) -> np.ndarray:
    """Returns a boolean for each block: whether it has an MoE layer."""
    return np.array([inner(kind) == "moe" for kind in cfg.blocks], bool)


def moe_blocks(cfg: ModelConfig) -> np.ndarray:
    """Returns the numbers of the blocks that have an MoE layer, int [L]."""
    return np.flatnonzero(has_experts(cfg))


def moe_layer_numbers(keys: Keys, cfg: ModelConfig) -> np.ndarray:
    """Returns which MoE layers the array at `keys` belongs to, as `block_numbers` does; the array
    must lie in blocks that have one.
    """
    # The n-th block that has experts is layer n - 1.
    return np.asarray((np.cumsum(has_experts(cfg)) - 1)[block_numbers(keys, cfg)])


# Modules: a model has its stack as the fields `prefix`, `repeats` and `suffix`. What `repeats`
# holds is one module with stacked parameters (scan) or a list of modules.


def draw_repeats(
    make: Callable[[jax.Array], nnx.Module], key: jax.Array, repeats: int, scan: bool
) -> Any:
    """Returns the modules that `make(key)` draws for each repeat, in either layout.

    They are drawn stacked in both: the values are the same, and there is one compiled draw however
    many layers there are.
    """
    if not repeats:
        return nnx.List([])
    keys = jax.random.split(key, repeats)
    # Each stage draws its own repeats alone.
    stacked = jax.vmap(make)(stages.split(keys) if scan else keys)
    if scan:
        return stacked

    def layer(i: int) -> Any:
        return jax.tree.map(lambda z: z[i], stacked)

    return nnx.List([layer(i) for i in range(repeats)])


def run_repeats(
    run: Callable[[Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]],
    periods: Any,
    x: jax.Array,
    cfg: ModelConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (x, sums) after all repeats; sums are {name: [n, B, ...]} in the order of the blocks.

    Args:
      run: (period, x, repeat) -> (x, sums) of one period; the repeat is an int or an int32 scalar.
      periods: what `draw_repeats` returned, or as many of the repeats as a stage of a pipeline has.
    """
    if cfg.scan and cfg.repeats:
        num_repeats = jax.tree.leaves(periods)[0].shape[0]
        numbers = jnp.arange(num_repeats, dtype=jnp.int32)
        if stages.are_split(periods):

            def body(x: jax.Array, i: Any) -> tuple[jax.Array, Any]:
                return run(stages.one_repeat(periods, i), x, i)

            x, sums = jax.lax.scan(body, x, numbers)
        else:

            def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
                return run(xs[0], x, xs[1])

            x, sums = jax.lax.scan(body, x, (periods, numbers))

        def joined(z: jax.Array) -> jax.Array:
            # The output's sharding is given, because beside a single repeat and a single row a
            # reshape forgets that rows are split.
            return jnp.reshape(z, (-1,) + z.shape[2:], out_sharding=P(None, BATCH))

        return x, jax.tree.map(joined, sums)
    parts = []
    for i, period in enumerate(periods):
        x, sums = run(period, x, i)
        parts.append(sums)
    return x, join_sums(jnp.concatenate, parts)


def join_sums(
    join: Callable[..., jax.Array], parts: list[dict[str, jax.Array]]
) -> dict[str, jax.Array]:
    """Joins what is there under each name: a block has the sums of its MoE layer, of its depth
    router, both or none.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: join([part[name] for part in parts if name in part]) for name in names}


def blocks_in_order(model: Any) -> list[Any]:
    """Returns the blocks of a module in the order in which they run; of the loop's layout only."""
    return [
        *model.prefix,
        *(block for period in model.repeats for block in period.blocks),
        *model.suffix,
    ]
