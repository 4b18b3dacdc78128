"""How parameters are declared: a shape, the logical name of every dimension, and how the first
value is drawn.

    weight                   first value                shape           split over (mesh.RULES)
    embed                    N(0, 1) / its scale        [V, D]          vocab, embed
    embed, a decoder's head  N(0, 1/D) / 10             [V, D]          vocab, embed
    head (untied)            N(0, 1/D) / 10             [D, V]          embed, vocab
    attention q, k, v        N(0, 1/D)                  [D, H or G, A]  embed, heads, -
    attention o              N(0, 1/(H A)) / sqrt(2 L)  [H, A, D]       heads, -, embed
    attention bias q, k, v   0                          [H or G, A]     heads, -
    attention bias o         0                          [D]             -
    attention sinks          0                          [H]             heads
    relative bias            N(0, 1/D)                  [buckets, H]    -, heads
    latent attention         models/attentions/latent.py, `weights`
    query and key norm       1, or 0 (norm_plus_one)    [A] or          -
                                                        [H or G, A]     heads, -
    norm scale               1, or 0 (norm_plus_one)    [D]             -
    w_join (models/mtp.py)   N(0, 1/(2 D))              [2, D, D]       -, embed, -
    dense w_in               N(0, 1/D)                  [D, P, F]       embed, -, hidden
    dense w_out              N(0, 1/F) / sqrt(2 L)      [F, D]          hidden, embed
    gate of shared experts   N(0, 1/D)                  [D]             embed
    expert w_in              N(0, 1/D)                  [E, D, P, F]    experts, expert_embed, -,
                                                                        hidden
    expert w_out             N(0, 1/F) / sqrt(2 L)      [E, F, D]       experts, hidden,
                                                                        expert_embed
    expert in_bias           0                          [E, P, F]       experts, -, hidden
    expert out_bias          0                          [E, D]          experts, -
    latent down              N(0, 1/D)                  [D, M]          embed, -
    latent up                N(0, 1/M)                  [M, D]          -, embed
    router gate              N(0, 1/D)                  [D, E]          embed, -
    other router weights     beside their router, in `params` and `state` of moe/routing/NAME.py
    depth router             moe_jax/models/depth.py, `declare`

D model, V vocabulary, H query heads, G key-value heads, A head width, F hidden, E experts, L
blocks; P = 2 (gate and up) for SwiGLU and its like, 1 for GELU; M the width of latent experts,
which have it in the place of D (moe/latent.py). The division by sqrt(2 L) keeps the residual
stream's variance at depth (Radford et al. 2019, GPT-2, section 2.3). Why a head begins small is in
docs/first_values.md. A key depends on the parameter's name only, so the loop and the scan over
layers, and every mesh, draw the same values.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.parallel.mesh import RANK, P, dividing, spec


class Weight(NamedTuple):
    """Holds how a parameter is declared."""

    shape: tuple[int, ...]
    # Logical dimension names, see mesh.RULES.
    names: tuple[str | None, ...]
    # Of the normal distribution that the first value is drawn from; 0 = `constant`.
    std: float
    constant: float = 0.0


class RouterState(nnx.Variable):
    """Holds what a router keeps from step to step without a gradient (bias, quantiles,
    coefficient).
    """


def partition_of(weight: Weight) -> P:
    """Returns how a weight is split over the current mesh."""
    parts = list(spec(*weight.names))
    if RANK in weight.names:
        at = weight.names.index(RANK)
        parts[at] = dividing(weight.shape[at]) or None
    return P(*parts)


def draw(key: jax.Array, weight: Weight, dtype: str) -> jax.Array:
    """Returns the first value of a weight, placed on the current mesh."""
    partition = partition_of(weight)
    if weight.std == 0:
        value = jnp.full(weight.shape, weight.constant, dtype)
        return jax.sharding.reshard(value, partition)
    # Each device draws its own part, so a large weight is never whole on one.
    return weight.std * jax.random.normal(key, weight.shape, dtype, out_sharding=partition)


class Weights(nnx.Module):
    """Holds named parameters, and nothing else."""

    def __init__(
        self,
        key: jax.Array,
        weights: dict[str, Weight],
        dtype: str,
        kind: type[nnx.Variable] = nnx.Param,
    ):
        for name, weight in weights.items():
            # Of the name alone, so that a further weight changes no other one's first value.
            weight_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            setattr(self, name, kind(draw(weight_key, weight, dtype)))

    def __getitem__(self, name: str) -> jax.Array:
        return getattr(self, name)[...]

    def arrays(self) -> dict[str, jax.Array]:
        """Returns the values of all parameters, by name."""
        fields = vars(self).items()
        return {name: field[...] for name, field in fields if isinstance(field, nnx.Variable)}
