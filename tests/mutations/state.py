"""Faults of what a step keeps: of the optimizer, of the routers' state, and of first values."""

import jax
import jax.numpy as jnp

from moe_jax import layout, optim, train_step, weights
from moe_jax.moe import load
from moe_jax.names import name_of
from moe_jax.parallel.mesh import P, spec
from mutations.contract import Mutation, batch_devices, length

BIASED = {"model.moe.router": "sigmoid", "model.prefix": ("moe",)}
# Below the norm of the gradients, so that the clip has something to do.
CLIPPED = {"optim.clip_norm": 0.01}


def state_of_another_layer(patch):
    """The states of the routers are taken in the opposite order of the layers."""
    right = layout.moe_layer_numbers
    patch.setattr(
        layout, "moe_layer_numbers", lambda keys, cfg: cfg.num_moe_layers - 1 - right(keys, cfg)
    )


def clip_by_one_shard(patch):
    """The norm that clips has of the experts only those of the first device of the expert axis."""
    right = optim.global_norm

    def counted(path, x):
        if "experts" not in name_of(path).split("/"):
            return x
        is_counted_E = jnp.arange(x.shape[0]) < x.shape[0] // length("expert")
        return x * is_counted_E.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def wrong(tree):
        return right(jax.tree_util.tree_map_with_path(counted, tree))

    patch.setattr(optim, "global_norm", wrong)


def bias_of_local_counts(patch):
    """The routers' state follows the load of the first device alone."""
    totals, update = load.totals, train_step.update_routers

    def with_local(sums_LB):
        found = totals(sums_LB)
        if "counts" not in sums_LB:
            return found
        counts_LBC = jax.sharding.reshard(sums_LB["counts"], P())
        first_LC = counts_LBC[:, : counts_LBC.shape[1] // batch_devices()].sum(1)
        return found | {"local": first_LC}

    def wrong(cfg, router_state, found):
        return update(cfg, router_state, found | {"counts": found["local"]})

    patch.setattr(load, "totals", with_local)
    patch.setattr(train_step, "update_routers", wrong)


def experts_drawn_alike(patch):
    """Every device of the expert axis draws its experts with the same key."""
    right = weights.draw

    def wrong(key, weight, dtype):
        if weight.names[:1] != ("experts",) or weight.std == 0:
            return right(key, weight, dtype)
        n = length("expert")
        number, *rest = weight.shape
        names = (None,) * len(weight.shape)
        mine = right(key, weight._replace(shape=(number // n, *rest), names=names), dtype)
        return jax.sharding.reshard(jnp.concatenate([mine] * n), spec(*weight.names))

    patch.setattr(weights, "draw", wrong)


FAULTS = {
    "clip norm without other devices' experts": Mutation(
        clip_by_one_shard,
        "state",
        "mesh",
        CLIPPED,
        "Megatron-LM #7452 (8), #5916",
        full=True,
    ),
    "router state of local counts": Mutation(
        bias_of_local_counts, "state", "mesh", BIASED, full=True
    ),
    "router state of another layer": Mutation(
        state_of_another_layer,
        "each router's state follows the load of its own layer",
        "alone",
        BIASED,
        full=True,
    ),
    "experts drawn alike on all devices": Mutation(
        experts_drawn_alike,
        "2x2x2 draws the same first values",
        "first values",
        reported="fastmoe #4",
    ),
}
