"""What devices send each other in an MoE layer, read off the function that training traces.

Shapes: B rows, S sequence, D model.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from moe_jax.models.block import moe_config
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.parallel.mesh import sharding
from moe_jax.plan.abstract import abstract_batch
from moe_jax.schema.config import Config
from moe_jax.weights import RouterState

# How often the bytes of the larger side of a collective pass a device. A sum over devices is a
# reduce-scatter and an all-gather (Thakur et al. 2005), so it counts twice.
COLLECTIVES = {
    "all_gather": 1,
    "all_gather_invariant": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "psum": 2,
    "psum_invariant": 2,
    "ragged_all_to_all": 1,
}


def layer_traffic(cfg: Config) -> tuple[Counter[str], Counter[str]]:
    """Returns the bytes that a device receives for one MoE layer and one micro-batch, by mesh axis.

    The first counter is of the forward pass, the second of forward and backward pass. Called with
    the mesh set; traces the layer, and neither compiles nor allocates.
    """
    moe = moe_config(cfg.model)

    def split(key):
        return nnx.split(MoELayer(key, moe), nnx.Param, RouterState)

    graphdef, weights, router_state = nnx.eval_shape(split, jax.eval_shape(jax.random.key, 0))
    num_rows, seq_len = cfg.train.micro_batch_size, cfg.data.seq_len
    zero_BS = np.zeros((num_rows, seq_len), np.int32)
    batch = abstract_batch(Batch(zero_BS, zero_BS, zero_BS, zero_BS[:, 0]))
    # The tokens of a row as a block has them (parallel/context.py).
    names = ("batch", "sequence" if cfg.mesh.seq > 1 else None, None)
    x_BSD = jax.ShapeDtypeStruct(
        (num_rows, seq_len, moe.d_model), moe.dtype, sharding=sharding(*names)
    )

    def forward(weights: Any, x_BSD: jax.Array, router_state: Any, batch: Batch) -> jax.Array:
        layer = nnx.merge(graphdef, weights, router_state)
        return layer(x_BSD, batch, jax.random.key(0), True)[0]

    def both_passes(weights: Any, x_BSD: jax.Array, *rest: Any) -> Any:
        def of_differentiated(weights, x_BSD):
            return forward(weights, x_BSD, *rest)

        y_BSD, pull_back = jax.vjp(of_differentiated, weights, x_BSD)
        # Any cotangent will do: only the shapes are read.
        return pull_back(y_BSD)

    lengths = dict(jax.sharding.get_mesh().shape)

    def traffic(function: Callable[..., Any]) -> Counter[str]:
        traced = jax.make_jaxpr(function)(weights, x_BSD, router_state, batch)
        return received(traced.jaxpr, lengths)

    return traffic(forward), traffic(both_passes)


def received(jaxpr: Jaxpr, lengths: Mapping[str, int]) -> Counter[str]:
    """Returns the bytes that a device receives in the collectives of a traced function.

    The keys are mesh axes, `lengths` are those of the axes. Loops count every trip. Of branches the
    one counts that sends least: further rounds of a dispatcher are for a load that is not balanced.
    Only collectives that the code writes are seen, not those that the compiler inserts.
    """
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        primitive = equation.primitive.name
        if primitive in COLLECTIVES:
            total.update(_of_collective(equation, lengths))
        # A layer has its collectives inside of shard_map, jit and scan.
        inner = [received(function, lengths) for function in _called(equation.params)]
        if primitive == "cond":
            inner = [min(inner, key=lambda counter: counter.total())]
        # A while loop has no length, so its body counts once.
        # A scan says how often it runs.
        trips = equation.params.get("length", 1) if primitive == "scan" else 1
        for counter in inner:
            total.update({axis: trips * count for axis, count in counter.items()})
    # Without the axes over which nothing travels.
    return +total


def _of_collective(equation: JaxprEqn, lengths: Mapping[str, int]) -> dict[str, int]:
    """Returns {axes: bytes} of one collective.

    Of n equal parts of the larger side a device has one and receives n - 1.
    """
    # Sums name their axes otherwise than the other collectives.
    named = equation.params.get("axis_name", equation.params.get("axes"))
    # One axis may stand alone, without a tuple.
    named = (named,) if isinstance(named, str) else named
    # Over an axis of length 1 nothing travels.
    axes = [axis for axis in named if lengths[axis] > 1]
    groups = equation.params.get("axis_index_groups")
    num_parts = len(groups[0]) if groups else math.prod(lengths[axis] for axis in axes)
    if equation.primitive.name == "ragged_all_to_all":
        # When the load is balanced it fills the smaller of what is sent from and received into.
        num_bytes = min(_num_bytes(equation.invars[:1]), _num_bytes(equation.outvars))
    else:
        num_bytes = max(_num_bytes(equation.invars), _num_bytes(equation.outvars))
    passes = COLLECTIVES[equation.primitive.name]
    received_bytes = passes * num_bytes * (num_parts - 1) // num_parts
    return {" x ".join(axes): received_bytes}


def _num_bytes(variables: Any) -> int:
    """Returns the bytes of the arrays that go into, or come out of, an equation."""
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)


def _called(params: Mapping[str, Any]) -> list[Jaxpr]:
    """Returns the functions that an equation calls: bodies of loops, branches, jitted functions."""
    functions: list[Jaxpr] = []
    for value in params.values():
        # Branches are a tuple of functions; all else that calls has one.
        for entry in value if isinstance(value, tuple | list) else (value,):
            if isinstance(entry, ClosedJaxpr):
                functions.append(entry.jaxpr)
            elif isinstance(entry, Jaxpr):
                functions.append(entry)
    return functions
