"""What an attention is.

The module that opens the shard_map, masks and writes back is models/attention.py. An attention says
which weights it has, what queries, keys and values are, which keys a token sees, in training and
with a cache, and what that costs. Those with ordinary heads share heads.py.

Masks, by name:

    causal    a token sees earlier ones of its segment, and itself
    full      a token sees its whole segment
    prefix    the tokens of a prefix see all of that; others are causal

Shapes: B rows, S sequence, D model, H query heads, G key-value heads, A width of a query and a key,
V width of a value, M slots of the cache.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax import Array

from moe_jax.models.attention_bias import Buckets
from moe_jax.models.attention_core import Keys
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.weights import Weight, Weights

# The mesh axes of queries, keys and values [B, S, H or G, A], and of what is known of tokens.
HEADS, TOKENS = P(BATCH, None, "model", None), P(BATCH, None)


def no_advice(cfg: Config) -> Iterator[str]:
    """Advises nothing."""
    del cfg
    yield from ()


def options_as_given(cfg: ModelConfig) -> Any:
    """Returns the options of an attention in which nothing can be written in two ways."""
    return cfg.attention_options


def nothing_shared(cfg: ModelConfig) -> dict[str, Weight]:
    """Declares no weights that the blocks of a stack share."""
    del cfg
    return {}


def no_buckets(mask: str, options: Any) -> Buckets | None:
    """Says that no bias is added to scores."""
    del mask, options
    return None


def shared_heads(cfg: ModelConfig) -> int:
    """Returns that queries share key heads."""
    return cfg.num_kv_heads


def small_already(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Changes nothing: no option depends on the length of a row."""
    del options, seq_len
    yield from ()


class Caching(NamedTuple):
    """Holds what an attention keeps of the tokens so far, and how it attends to that.

    A cache is a NamedTuple of arrays with a dimension of M slots, and says M as `num_slots`: slot i
    of a row holds the token at position i. Heads come before slots, for then what a head has seen
    lies together: with the slots first a step of 32 rows transposed all keys and values, which took
    three times as long. A cache is an argument and a return, never a variable.
    """

    # (cfg, number of rows, number of slots) -> a cache that holds no token.
    empty: Callable[[ModelConfig, int, int], Any]
    # The mesh axes of its arrays, and of what goes into it, in NamedTuples of the same type.
    specs: Any
    new_specs: Any
    # Which dimension of its arrays is that of the slots, counted from the end; of the same type.
    slot_axes: Any
    # (weights, x_BSD, position_BS, cfg) -> (queries [B, S, H, .], what goes into the cache: arrays
    # [B, S, ...], whose other dimensions are in the order of the cache).
    inputs: Callable[[Weights, Array, Array, ModelConfig], tuple[Array, Any]]
    # A cache of one device -> (keys [B, G, ., M], values [B, G, M, .]).
    keys_and_values: Callable[[Any], tuple[Array, Array]]
    # (weights, what the heads read [B, S, H, .], cfg) -> o_BSHV.
    outputs: Callable[[Weights, Array, ModelConfig], Array]


class Attention(NamedTuple):
    """Holds all that there is to know of an attention; `ATTENTION` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    # (cfg) -> the weights by name: those of the projections, and o.
    weights: Callable[[ModelConfig], dict[str, Weight]]
    # (weights, x_BSD, position_BS, cfg) -> (q_BSHA, k_BSGA, v_BSGV) of whole rows, turned by their
    # positions.
    inputs: Callable[[Weights, Array, Array, ModelConfig], tuple[Array, Array, Array]]
    # The factor on the scores.
    scale: Callable[[ModelConfig], float]
    # (A, V), of which a pair of a query and a key takes as many multiply-adds.
    widths: Callable[[ModelConfig], tuple[int, int]]
    # The masks that it can have.
    masks: tuple[str, ...]
    # (mask, segment_BS, prefix_BS, options) -> the keys that each token of whole rows sees.
    keys: Callable[[str, Array, Array | None, Any], Keys]
    # With the mask "causal", may a later token change an earlier output?
    sees_future: bool
    caching: Caching
    # (position_BS, last_BS, number of slots, options) -> the slots that each token sees [B, S, M].
    # Its last one is its own position, or the end of the prefix that it belongs to.
    slots: Callable[[Array, Array, int, Any], Array]
    # (number of tokens, options) -> how many keys all tokens of one causal row see together.
    num_pairs: Callable[[int, Any], int]
    # (config, its name) -> what is wrong with its options and the heads together.
    refusals: Callable[[Config, str], Iterator[str]]
    # (cfg) -> G, the heads of keys and values in training.
    key_heads: Callable[[ModelConfig], int] = shared_heads
    # (cfg) -> its options, where those that compute the same are the same (interchange/meaning.py).
    normal_form: Callable[[ModelConfig], Any] = options_as_given
    # (cfg) -> weights by name that all blocks of a stack with this attention share.
    shared: Callable[[ModelConfig], dict[str, Weight]] = nothing_shared
    # (mask, options) -> the buckets of a bias by the distance of two tokens, whose numbers are
    # `shared` (attention_bias.py); None = there is no bias.
    buckets: Callable[[str, Any], Buckets | None] = no_buckets
    # Yields what a run is told at its start; model.attention is its name.
    advice: Callable[[Config], Iterator[str]] = no_advice
    # (raw options, seq_len) -> keys and values that suit rows of that length, which are short.
    small: Callable[[Mapping[str, Any], int], Iterator[tuple[str, Any]]] = small_already
