"""The MoE layer for a model that is not ours: one device, no mesh, no config file.

    layer = moe_jax.MoELayer(256, 8, 512, router="top_k", rngs=nnx.Rngs(0))
    y_BSD, routing = layer(x_BSD)
    loss = task_loss + 0.01 * routing.balance() + 0.001 * routing.z()

It is the layer of our own models (moe/layer.py), so what is proven of that holds of this one.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.config import config_file
from moe_jax.errors import UserError
from moe_jax.models.block import moe_config
from moe_jax.moe import layer, load, losses
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg
from moe_jax.parallel import mesh
from moe_jax.parallel.mesh import BATCH, P


@flax.struct.dataclass
class RoutingStatistics:
    """Holds what a layer's routing of one batch adds up to. A pytree: it may leave jit and grad.

    Fields:
      sums: {name: [B, ...]} per row, see moe/load.py.
    """

    sums: Mapping[str, jax.Array]

    def totals(self) -> dict[str, jax.Array]:
        """Returns the sums over the rows, with a leading axis of one layer."""
        return load.totals({name: x[None] for name, x in self.sums.items()})

    def loss(self, name: str) -> jax.Array:
        """Returns an auxiliary loss, without coefficient; `name`: a key of LOSSES (moe/losses)."""
        return losses.LOSSES[name].value(self.totals())[0]

    def auxiliary(self, **coefficients: float) -> jax.Array:
        """Returns the weighted sum of auxiliary losses, as in auxiliary(balance=0.01, z=0.001).

        For the router "relu" with its own L1 loss, for which no coefficient is given.
        """
        return losses.auxiliary(self.totals(), coefficients)[0]

    def balance(self) -> jax.Array:
        """Returns the load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6); 1 when
        balanced.
        """
        return self.loss("balance")

    def z(self) -> jax.Array:
        """Returns the router z-loss (Zoph et al. 2022, arXiv:2202.08906, eq. 5)."""
        return self.loss("z")

    def figures(self) -> dict[str, jax.Array]:
        """Returns what is known of the load: counts [E], load_max, drop_fraction and others of
        moe/load.py.
        """
        return {name: x[0] for name, x in load.metrics(self.totals()).items()}


class MoELayer(nnx.Module):
    """Routed experts in anybody's flax nnx model.

    Without a mesh it computes on one device, in and out of jax.jit. Where a mesh with the axes of
    moe_jax.parallel.mesh is set, its experts and rows are sharded over it.

    Args:
      d_model: width of a token.
      num_experts, expert_hidden: number of experts, and hidden width of each.
      router: a name of moe_jax.ROUTERS; router_options: its options, as in {"k": 1}.
      dispatcher: "dropless", "capacity" (drops what is beyond) or "slots" (the router "soft").
      activation: of an expert, "swiglu" or "gelu".
      vocab_size: of the token ids that the router "hash" reads.
      dtype, param_dtype: of the computation, and of the parameters. The router is at least float32.
      rngs: draws the first values.

    Some routers and dispatchers let a later token change the output of an earlier one: the table in
    docs/routers.md says which. Raises UserError for options that do not go together.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        expert_hidden: int,
        *,
        router: str = "top_k",
        router_options: Mapping[str, Any] | None = None,
        dispatcher: str = "dropless",
        dispatcher_options: Mapping[str, Any] | None = None,
        activation: str = "swiglu",
        vocab_size: int = 1,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        changes: dict[str, Any] = {
            "d_model": d_model,
            "vocab_size": vocab_size,
            "activation": activation,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "moe.num_experts": num_experts,
            "moe.expert_hidden": expert_hidden,
            "moe.router": router,
            "moe.dispatcher": dispatcher,
        }
        # Options go the way of the config, so they are checked as those of a run are.
        for name, value in (router_options or {}).items():
            changes[f"moe.routers.{router}.{name}"] = value
        for name, value in (dispatcher_options or {}).items():
            changes[f"moe.dispatchers.{dispatcher}.{name}"] = value
        self.cfg = _built(changes)
        with _one_device():
            self.layer = layer.MoELayer(rngs.params(), moe_config(self.cfg))

    def __call__(
        self,
        x_BSD: jax.Array,
        *,
        train: bool = True,
        rng: jax.Array | None = None,
        valid_BS: jax.Array | None = None,
        id_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingStatistics]:
        """Returns the output [B, S, D] and the statistics of this routing.

        Args:
          x_BSD: rows, tokens, width. Capacity and orderings are of one row.
          train: False at evaluation, where some routers decide otherwise.
          rng: a key, new at each step, for routers that draw.
          valid_BS: False for padding, which is not routed.
          id_BS: token ids, for the routers "hash" and "random".
        """
        # Only routers that draw read it.
        rng = jax.random.key(0) if rng is None else rng
        # Split, so that the compiled program takes the parameters as arguments.
        graph, state = nnx.split(self.layer)
        return _applied(graph, train, _mesh_is_set(), state, x_BSD, valid_BS, id_BS, rng)

    def update(self, statistics: RoutingStatistics) -> None:
        """Moves the state of a router that has one (a bias, quantiles). Once per optimizer step."""
        moe = self.cfg.moe
        sizes = (moe.num_experts, moe.router_options, moe.group_rows, self.cfg.vocab_size)
        router_cfg = RouterCfg(*sizes, total=lambda z: z)
        # Of the one layer.
        totals = {name: x[0] for name, x in statistics.totals().items()}
        # By the names that the router declared.
        state = self.layer.state.arrays()
        for name, value in ROUTERS[moe.router].update(state, totals, router_cfg).items():
            getattr(self.layer.state, name)[...] = value.astype(state[name].dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _applied(graph, train: bool, on_mesh: bool, state, x_BSD, valid_BS, id_BS, rng):
    """Returns what the layer does, as a compiled program."""
    num_rows, row_length, _ = x_BSD.shape
    shape_BS = (num_rows, row_length)
    # Each row is one document that begins at position 0.
    position_BS = jnp.broadcast_to(jnp.arange(row_length, dtype=jnp.int32), shape_BS)
    # Segment 0 is padding.
    segment_BS = jnp.ones(shape_BS, jnp.int32) if valid_BS is None else valid_BS.astype(jnp.int32)
    id_BS = jnp.zeros(shape_BS, jnp.int32) if id_BS is None else id_BS
    row_B = jnp.arange(num_rows, dtype=jnp.int32)

    def by_rows(z: jax.Array) -> jax.Array:
        return jax.sharding.reshard(z, P(BATCH))

    # Compiled also when called step by step: an abstract mesh has no devices, which only a program
    # can do without.
    one_device = mesh.make(mesh.ONE, jax.devices()[:1]).abstract_mesh
    with contextlib.nullcontext() if on_mesh else jax.sharding.use_abstract_mesh(one_device):
        batch = layer.Batch(
            id_BS=by_rows(id_BS),
            position_BS=by_rows(position_BS),
            segment_BS=by_rows(segment_BS),
            row_B=by_rows(row_B),
        )
        moe_layer = nnx.merge(graph, state)
        y_BSD, sums = moe_layer(by_rows(x_BSD), batch, rng, train)
    return y_BSD, RoutingStatistics(sums)


def _mesh_is_set() -> bool:
    """Returns whether a mesh of ours is set. Raises UserError when it is another one."""
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and current.axis_names != mesh.AXES:
        raise UserError(
            f"MoELayer: the mesh that is set has the axes {current.axis_names}, and the layer "
            f"knows {mesh.AXES}: make it by moe_jax.parallel.mesh.make, or set none"
        )
    return not current.empty


def _one_device() -> contextlib.AbstractContextManager[Any]:
    """Returns a context with a mesh of one device, unless one is set."""
    if _mesh_is_set():
        return contextlib.nullcontext()
    return jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1]))


def _built(changes: Mapping[str, Any]) -> Any:
    """Returns the checked config of a model of one such layer. UserError."""
    c = config.defaults()
    # What the rules ask of a decoder, and the layer does not use. What leaks from later tokens
    # (docs/routers.md) is up to the model that the layer is put into.
    c.model.update({"num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "allow_leak": True})
    # One MoE block, from which the layer's config is taken.
    c.model.prefix, c.model.period, c.model.repeats = ("moe",), (), 0
    c.model.moe.losses.balance, c.model.moe.losses.z = 0.0, 0.0
    try:
        c.model.update_from_flattened_dict(dict(changes))
    except (KeyError, TypeError, ValueError) as error:
        text = config_file.misspelt(error) or " ".join(str(error).split())
        raise UserError(
            f"MoELayer: {text}; `python -m moe_jax config` prints the options below model.moe"
        ) from None
    return config.build(c.to_dict(), 1).model
