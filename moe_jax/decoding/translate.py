"""Decodes a target row for each source row, with keys and values kept: by an encoder-decoder, or by
a decoder that has the source as its prefix.

    encdec     the source is encoded once; the target begins with the boundary token
    decoder    the source is the row's beginning, whose last token predicts the target's first;
               `source.prefix_BS` tells which of its tokens are the prefix that sees all of itself
               (model.kinds.decoder.bidirectional_prefix)

One jitted program of static shapes: a row stops at the boundary token, the loop when all have.
Temperature 0 takes the likeliest token.

Shapes: B rows, T source sequence, N target tokens at most, M length of the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import layout
from moe_jax.decoding.sample import Dials, draw
from moe_jax.errors import UserError
from moe_jax.models import decoder, encdec
from moe_jax.models.decodable import reading_sources, token_by_token, why_not_cached
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import ModelConfig

Translator = Callable[..., jax.Array]


def make_translator(
    model_cfg: ModelConfig, max_tokens: int, boundary_id: int, vocab_size: int
) -> Translator:
    """Returns `translator(params, router_state, source, dials) -> id_BN`, int32, whole on every
    device; what follows a row's end is `boundary_id`.

    Args:
      model_cfg: of the parameters that the translator will be given; stacked layers (scan) are
          copied into single ones.
      max_tokens: N.
      vocab_size: of the tokenizer; ids from there on are never drawn.

    `source` is a Batch of int32 [B, T] (NumPy, the same in every process, or on the mesh), its
    tokens at the beginning of their rows, segment 0 where there is padding. `dials` are those of
    sample.py (`sample.dials(settings)`). Called with the mesh set. Raises UserError for a model
    that cannot decode token by token.
    """
    _refuse_undecodable(model_cfg)
    # No token may be dropped, and what the layers keep is a list of layers, not a stack.
    cfg = token_by_token(model_cfg)
    bind, bind_reader = make_model(cfg).bind, make_model(reading_sources(model_cfg)).bind
    begin = _begin_encdec if cfg.kind == encdec.NAME else _begin_decoder

    @jax.jit
    def translate(params: Any, router_state: Any, source: Batch, dials: Dials) -> jax.Array:
        params = layout.unstack(params, model_cfg)
        router_state = layout.unstack(router_state, model_cfg)
        model, reader = bind(params, router_state), bind_reader(params, router_state)
        source = jax.tree.map(_split_rows, source)
        start = begin(model, reader, cfg, source, max_tokens, boundary_id)
        return _decode(start, source, dials, max_tokens, boundary_id, vocab_size)

    return translate


def _refuse_undecodable(cfg: ModelConfig) -> None:
    """Raises UserError for a model that does not translate, or that keeps no keys and values."""
    if cfg.kind not in (encdec.NAME, decoder.NAME):
        raise UserError(
            f'model.kind = "{cfg.kind}" translates nothing: only "{encdec.NAME}" and '
            f'"{decoder.NAME}" do'
        )
    if reason := why_not_cached(cfg):
        raise UserError(f"this model cannot be decoded: {reason}")


def _split_rows(x: jax.Array) -> jax.Array:
    """Returns an array [B, ...] split by rows over the devices."""
    return jax.sharding.reshard(x, P(BATCH, *[None] * (x.ndim - 1)))


class Start(NamedTuple):
    """Holds what the loop over tokens begins with."""

    # (id_B, position_B, live_B, caches) -> (logits [B, 1, V], caches): one token of every row.
    forward: Callable[..., tuple[jax.Array, Any]]
    caches: Any
    # The first token that goes through.
    id_B: jax.Array
    # Its position.
    position_B: jax.Array


def _decode(
    start: Start, source: Batch, dials: Dials, max_tokens: int, boundary_id: int, vocab_size: int
) -> jax.Array:
    """Draws tokens until every row has drawn the boundary; returns id_BN."""
    # What is drawn from is whole on every device: each draws the same tokens, with random numbers
    # that depend on the row and the place alone.
    row_B = jax.sharding.reshard(source.row_B, P())

    def step(carry):
        num_drawn, id_B, live_B, id_NB, caches = carry
        logits_B1V, caches = start.forward(id_B, start.position_B + num_drawn, live_B, caches)
        logits_BV = jax.sharding.reshard(logits_B1V, P())[:, 0]
        is_token_V = jnp.arange(logits_BV.shape[1]) < vocab_size
        logits_BV = jnp.where(is_token_V[None], logits_BV, -jnp.inf)
        drawn_B = draw(logits_BV, row_B, jnp.full_like(row_B, num_drawn), dials)
        # A row that has ended says the boundary for ever, and goes through as padding.
        new_B = jnp.where(live_B, drawn_B, boundary_id)
        live_B = live_B & (new_B != boundary_id)
        return num_drawn + 1, new_B, live_B, id_NB.at[num_drawn].set(new_B), caches

    def goes_on(carry):
        num_drawn, _, live_B, _, _ = carry
        return (num_drawn < max_tokens) & live_B.any()

    # A row of padding alone, which fills up a batch, has ended before it begins.
    live_B = jax.sharding.reshard((source.segment_BS > 0).any(1), P())
    id_NB = jnp.full((max_tokens, *start.id_B.shape), boundary_id, jnp.int32)
    carry = (jnp.int32(0), start.id_B, live_B, id_NB, start.caches)
    _, _, _, id_NB, _ = jax.lax.while_loop(goes_on, step, carry)
    return id_NB.T


def _one_token(
    source: Batch, id_B: jax.Array, position_B: jax.Array, live_B: jax.Array, length: int
) -> Batch:
    """Returns the next token of every row; a row that has ended is padding.

    Its position is `length`, one behind the last slot of the cache, so that it writes to none.
    """

    def at(z_B):
        return jax.sharding.reshard(z_B[:, None], P(BATCH, None))

    position_B = jnp.where(live_B, position_B, length)
    return Batch(at(id_B), at(position_B), at(live_B.astype(jnp.int32)), source.row_B)


def _begin_encdec(
    model: Any, reader: Any, cfg: ModelConfig, source: Batch, max_tokens: int, boundary_id: int
) -> Start:
    """Encodes the source by `reader`; the target begins with the boundary token."""
    encoded, _ = reader.encode(source, jax.random.key(0), False)
    memories = model.memories(encoded)

    def forward(id_B, position_B, live_B, caches):
        token = _one_token(source, id_B, position_B, live_B, max_tokens)
        return model.cached(token, caches, memories)

    zero_B = jnp.zeros(source.row_B.shape, jnp.int32)
    caches = empty_caches(decoder.as_decoder(cfg), zero_B.shape[0], max_tokens)
    return Start(forward, caches, zero_B + boundary_id, zero_B)


def _begin_decoder(
    model: Any, reader: Any, cfg: ModelConfig, source: Batch, max_tokens: int, boundary_id: int
) -> Start:
    """Runs the source once, which leaves its keys and values.

    Its last token goes through again as the first token, which gives the first logits.
    """
    del reader, boundary_id
    num_rows, length = source.id_BS.shape
    num_slots = length + max_tokens
    caches = empty_caches(cfg, num_rows, num_slots)
    valid_BS = source.segment_BS > 0
    # Padding is at a position without a slot, so it leaves no keys.
    position_BS = jnp.where(valid_BS, source.position_BS, num_slots)
    _, caches = model.cached(source._replace(position_BS=position_BS), caches)

    def forward(id_B, position_B, live_B, caches):
        token = _one_token(source, id_B, position_B, live_B, num_slots)
        return model.cached(token, caches)

    last_B = jnp.maximum(valid_BS.sum(1) - 1, 0).astype(jnp.int32)
    # A sum over a mask, not a gather: rows are split over the devices.
    is_last_BS = jnp.arange(length, dtype=last_B.dtype)[None] == last_B[:, None]
    id_B = jnp.where(is_last_BS, source.id_BS, 0).sum(1, dtype=jnp.int32)
    return Start(
        forward, caches, jax.sharding.reshard(id_B, P()), jax.sharding.reshard(last_B, P())
    )
