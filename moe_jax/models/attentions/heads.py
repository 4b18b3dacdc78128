"""Ordinary heads: the projections that most attentions have, their rotary embeddings, and their
cache of keys and values.

Query heads share key and value heads (Ainslie et al. 2023, arXiv:2305.13245); as many of both are
multi-head attention (Vaswani et al. 2017, arXiv:1706.03762).

Rotary embeddings (Su et al. 2021, arXiv:2104.09864) turn the first `model.rope_fraction` of a head
(Black et al. 2022, GPT-NeoX-20B, arXiv:2204.06745, section 2.1.1). The pairs that turn are its
halves, or neighbours (`model.rope_pairs`): the same function of weights whose columns stand in
another order, so that weights of both kinds may be read as they are.

With `model.attention_sinks` each query head has a learned number that stands in its softmax beside
the scores, and no value: a head may attend to nothing (gpt-oss, arXiv:2508.10925; Xiao et al. 2023,
arXiv:2309.17453, section 3.3).

Shapes: B rows, S sequence, D model, H query heads, G key-value heads, A head width, M slots.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.models.attentions.contract import HEADS, Caching
from moe_jax.models.layers import gather, linear, norm, rope, rotate, scale_of_norm
from moe_jax.models.rope_scalings import ROPE_SCALINGS
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.weights import Weight, Weights

SINKS = "sinks"
# The mesh axes of keys [B, G, A, M] and values [B, G, M, A] in a cache.
SLOTS = P(BATCH, "model", None, None)


class Cache(NamedTuple):
    """Keys and values of the tokens so far."""

    # Arrays, or their specs; of new tokens [B, S, G, A]. A query is scored against all slots at
    # once, and weights are summed over slots: either has what it goes through side by side.
    k_BGAM: Any
    v_BGMA: Any

    @property
    def num_slots(self) -> int:
        return self.v_BGMA.shape[2]


def weights(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the weights of self-attention: the projections, and sinks."""
    return projections(cfg) | sinks(cfg)


def projections(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the weights of queries, keys, values and output, with biases and norms where the
    config has them.
    """
    d, h, g, a = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    declared = {
        # A standard deviation of d^-0.5 keeps the variance of what it is given.
        "q": Weight((d, h, a), ("embed", "heads", None), d**-0.5),
        "k": Weight((d, g, a), ("embed", "heads", None), d**-0.5),
        "v": Weight((d, g, a), ("embed", "heads", None), d**-0.5),
        **output(cfg, a),
    }
    if cfg.attention_bias:
        for name, num_heads in (("q", h), ("k", g), ("v", g)):
            declared[f"{name}_bias"] = Weight((num_heads, a), ("heads", None), 0.0)
    if cfg.qk_norm:
        for name, num_heads in (("q", h), ("k", g)):
            declared[f"{name}_norm_scale"] = _score_norm(num_heads, cfg)
    return declared


def output(cfg: ModelConfig, width: int) -> dict[str, Weight]:
    """Returns the weights that write to the residual stream, of heads that read so many numbers."""
    d, h = cfg.d_model, cfg.num_heads
    # Each block writes to the residual stream twice. Weights are also asked for where there is no
    # block, to be counted.
    num_blocks = max(len(cfg.blocks), 1)
    # Smaller by the root of their number, so that the stream does not grow with the depth (GPT-2).
    out_std = (h * width) ** -0.5 * (2 * num_blocks) ** -0.5
    declared = {"o": Weight((h, width, d), ("heads", None, "embed"), out_std)}
    if cfg.output_bias:
        declared["o_bias"] = Weight((d,), (None,), 0.0)
    return declared


def sinks(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the sink of each query head, which begins as a score of 0; {} without sinks."""
    return {SINKS: Weight((cfg.num_heads,), ("heads",), 0.0)} if cfg.attention_sinks else {}


def _score_norm(num_heads: int, cfg: ModelConfig) -> Weight:
    """Returns the scale of the norm of queries or keys: one for all heads [A], or each its own."""
    if cfg.qk_norm_over == "head":
        return scale_of_norm((cfg.head_dim,), (None,), cfg)
    return scale_of_norm((num_heads, cfg.head_dim), ("heads", None), cfg)


def scale(cfg: ModelConfig) -> float:
    """Returns the factor on the scores."""
    return cfg.attention_scale or cfg.head_dim**-0.5


def widths(cfg: ModelConfig) -> tuple[int, int]:
    """Returns the widths of a key and of a value."""
    return cfg.head_dim, cfg.head_dim


def project(weights: Weights, name: str, x_BSD: Array, cfg: ModelConfig) -> Array:
    """Returns queries, keys or values [B, S, H or G, A] of x."""
    w_DHA = gather(weights[name], ("embed", "heads", None), cfg.dtype)
    with jax.named_scope("in_projection"):
        y = linear(x_BSD, w_DHA, cfg.dtype)
    if cfg.attention_bias:
        bias_HA = weights[f"{name}_bias"].astype(cfg.dtype)
        y = y + bias_HA[None, None]
    # Norms keep scores bounded; a value has no score.
    if cfg.qk_norm and name != "v":
        # A scale [A] is that of each head, one [H, A] that of all heads together.
        y = norm(y, weights[f"{name}_norm_scale"], cfg)
    return y


def inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    """Returns (queries, keys, values); the first two turned by their positions."""
    q = project(weights, "q", x_BSD, cfg)
    k = project(weights, "k", x_BSD, cfg)
    v = project(weights, "v", x_BSD, cfg)
    # Turned once, and read by every head.
    cos, sin = angles(position_BS, cfg, rope_width(cfg))
    # A score then depends on how far two tokens are apart. Values are read, wherever they are.
    return turned(q, cos, sin, cfg), turned(k, cos, sin, cfg), v


def rope_width(cfg: ModelConfig) -> int:
    """Returns how many numbers of a head are turned."""
    return int(cfg.head_dim * cfg.rope_fraction)


def angles(position_BS: Array, cfg: ModelConfig, width: int) -> tuple[Array, Array]:
    """Returns cos and sin [B, S, 1, width] of the rotary angles, with the scaling of the config."""
    scaling, options = ROPE_SCALINGS[cfg.rope_scaling], cfg.rope_scaling_options

    def scaled(frequency_P: Array) -> Array:
        return scaling.frequencies(frequency_P, cfg.rope_theta, options)

    cos, sin = rope(position_BS, width, cfg.rope_theta, cfg.dtype, scaled)
    magnitude = scaling.magnitude(options)
    # On both queries and keys, so that a score has its square (YaRN, arXiv:2309.00071).
    return cos * magnitude, sin * magnitude


def turned(x_BSHA: Array, cos: Array, sin: Array, cfg: ModelConfig) -> Array:
    """Returns heads whose first numbers, as many as there are angles, are turned."""
    width = cos.shape[-1]
    if width == x_BSHA.shape[-1]:
        return rotate(_halves(x_BSHA, cfg), cos, sin)
    first = rotate(_halves(x_BSHA[..., :width], cfg), cos, sin)
    return jnp.concatenate([first, x_BSHA[..., width:]], axis=-1)


def _halves(x_BSHA: Array, cfg: ModelConfig) -> Array:
    """Returns heads in whose order the pairs are the two halves: scores do not know the order."""
    if cfg.rope_pairs == "halves":
        return x_BSHA
    pair_BSHP2 = x_BSHA.reshape(*x_BSHA.shape[:-1], -1, 2)
    return jnp.concatenate([pair_BSHP2[..., 0], pair_BSHP2[..., 1]], axis=-1)


def empty_cache(cfg: ModelConfig, num_rows: int, num_slots: int) -> Cache:
    """Returns a cache of `num_slots` positions a row, on the current mesh."""

    def zeros(*shape: int) -> Array:
        whole = (num_rows, cfg.num_kv_heads, *shape)
        return jax.sharding.reshard(jnp.zeros(whole, cfg.dtype), SLOTS)

    return Cache(zeros(cfg.head_dim, num_slots), zeros(num_slots, cfg.head_dim))


def cached_inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, Cache]:
    """Returns (queries, keys and values of the tokens)."""
    q, k, v = inputs(weights, x_BSD, position_BS, cfg)
    return q, Cache(k, v)


def keys_and_values(cache: Cache) -> tuple[Array, Array]:
    return cache.k_BGAM, cache.v_BGMA


def as_they_are(weights: Weights, o_BSHA: Array, cfg: ModelConfig) -> Array:
    """Returns what is given: values are kept whole."""
    del weights, cfg
    return o_BSHA


def uneven_heads(m: ModelConfig) -> Iterator[str]:
    """Query heads share key heads evenly."""
    if m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_heads ({m.num_heads}) must be divisible by model.num_kv_heads "
            f"({m.num_kv_heads})"
        )


CACHING = Caching(
    empty_cache,
    Cache(SLOTS, SLOTS),
    Cache(HEADS, HEADS),
    Cache(-1, -2),
    cached_inputs,
    keys_and_values,
    outputs=as_they_are,
)


def refusals(cfg: Config, name: str) -> Iterator[str]:
    """Refuses heads that do not share keys evenly, and an odd number of dimensions that turn."""
    del name
    m = cfg.model
    yield from uneven_heads(m)
    width = rope_width(m)
    if width % 2 == 0 and width:
        return
    if m.rope_fraction == 1:
        yield f"model.head_dim ({m.head_dim}) must be even: rotary embeddings turn pairs"
    else:
        yield (
            f"model.rope_fraction ({m.rope_fraction}) of model.head_dim ({m.head_dim}) is {width}: "
            "it must be even and not 0, because rotary embeddings turn pairs"
        )
