"""What a kind of model is.

A model is an nnx.Module `Model(key, cfg)`. It is called with (batch, rng, train) and gives
(outputs, sums), sums per row of its layers {name: [L, B, ...]}.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.models.counting import Decoder
from moe_jax.schema.config import Config, ModelConfig


def no_refusals(cfg: Config) -> Iterator[str]:
    """Refuses nothing."""
    del cfg
    yield from ()


def small_already(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Changes nothing: no option decides the size of the model."""
    del options, seq_len
    yield from ()


def tokens_alone(
    options: Any, vocab_size: int, shape: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    """Says that a model reads nothing beside tokens."""
    del options, vocab_size, shape, rng
    return {}


def never_silent(options: Any) -> str:
    """Says that no option keeps a kind of model from continuing a text."""
    del options
    return ""


class Kind(NamedTuple):
    """Holds all that there is to know of a kind of model; `KIND` of its file.

    What has no default would be silently wrong if it were forgotten.
    """

    # The frozen dataclass of its block in the config, a KindOptions (schema/config.py).
    options: type
    # (key, cfg) -> the module.
    module: Callable[..., Any]
    # Its outputs are predictions of what comes next: what a later token changes is a leak.
    causal: bool
    # (cfg, decoder) -> plan.flops.Counts; None = it has the parameters of a decoder.
    parameters: Callable[[ModelConfig, Decoder], Any] | None
    # (cfg, seq_len, decoder) -> plan.flops.Breakdown of a token's forward pass; None likewise.
    forward_flops: Callable[[ModelConfig, int, Decoder], Any] | None
    # It predicts the next token of a text, so it can continue one.
    writes_text: bool
    # Its outputs are the logits of models/ends.py, which model.logit_cap is of.
    caps_logits: bool = False
    # The tokens of a row may be split over the mesh axis `seq` (parallel/context.py).
    splits_rows: bool = False
    # Options -> why it continues no text with them, although its kind does; "" = it does.
    why_silent: Callable[[Any], str] = never_silent
    # Instruments that look into the routing of each token know it.
    instruments: bool = False
    # (raw options, seq_len) -> keys and values that make its model small, for rows of that length.
    small: Callable[[Mapping[str, Any], int], Iterator[tuple[str, Any]]] = small_already
    # (options, vocab_size, shape [B, S], rng) -> the fields of a Batch that it reads beside tokens,
    # as random NumPy arrays.
    random_inputs: Callable[..., Any] = tokens_alone
    # Yields what is wrong with its options together.
    refusals: Callable[[Config], Iterator[str]] = no_refusals
