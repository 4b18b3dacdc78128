"""Decoding of a target row for each source row: an encoder-decoder, or a decoder with a prefix,
with keys and values kept.

    encdec     the source is encoded once; the target begins with the boundary token
    decoder    the source is the row's beginning, whose last token predicts the target's first;
               `source.prefix_BS` tells which of its tokens are the prefix that sees all of itself
               (model.kinds.decoder.bidirectional_prefix)

One jitted program of static shapes: a row stops at the boundary token, the loop when all have.
Temperature 0 takes the likeliest token.

Shapes: B rows, T source sequence, N target tokens at most, M length of the cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import layout
from moe_jax.decoding.sample import Dials, draw
from moe_jax.errors import UserError
from moe_jax.models import decoder, encdec
from moe_jax.models.decodable import why_not_cached, with_dispatcher
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches
from moe_jax.moe.dispatch import LOSSLESS
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import ModelConfig

Translator = Callable[..., jax.Array]


def make_translator(
    model_cfg: ModelConfig, max_tokens: int, boundary_id: int, vocab_size: int
) -> Translator:
    """`translator(params, router_state, source, dials) -> id_BN` int32, whole on every device; what
    follows a row's end is `boundary_id`.

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
    if model_cfg.kind not in (encdec.NAME, decoder.NAME):
        raise UserError(
            f'model.kind = "{model_cfg.kind}" translates nothing: only "{encdec.NAME}" and '
            f'"{decoder.NAME}" do'
        )
    if reason := why_not_cached(model_cfg):
        raise UserError(f"this model cannot be decoded: {reason}")
    cfg = dataclasses.replace(with_dispatcher(model_cfg, LOSSLESS), scan=False)
    bind = make_model(cfg).bind

    @jax.jit
    def translate(params: Any, router_state: Any, source: Batch, dials: Dials) -> jax.Array:
        params, router_state = (layout.unstack(tree, model_cfg) for tree in (params, router_state))
        model = bind(params, router_state)
        source = jax.tree.map(
            lambda z: jax.sharding.reshard(z, P(BATCH, *[None] * (z.ndim - 1))), source
        )
        begin = _begin_encdec if cfg.kind == encdec.NAME else _begin_decoder
        forward, caches, id_B, position_B = begin(model, cfg, source, max_tokens, boundary_id)
        row_B = jax.sharding.reshard(source.row_B, P())

        def step(carry):
            made, id_B, live_B, id_NB, caches = carry
            logits_B1V, caches = forward(id_B, position_B + made, live_B, caches)
            logits_BV = jax.sharding.reshard(logits_B1V, P())[:, 0]
            logits_BV = jnp.where(
                jnp.arange(logits_BV.shape[1])[None] < vocab_size, logits_BV, -jnp.inf
            )
            new_B = jnp.where(
                live_B, draw(logits_BV, row_B, jnp.full_like(row_B, made), dials), boundary_id
            )
            return (
                made + 1,
                new_B,
                live_B & (new_B != boundary_id),
                id_NB.at[made].set(new_B),
                caches,
            )

        live_B = jax.sharding.reshard((source.segment_BS > 0).any(1), P())
        id_NB = jnp.full((max_tokens, *id_B.shape), boundary_id, jnp.int32)
        carry = (jnp.int32(0), id_B, live_B, id_NB, caches)
        return jax.lax.while_loop(lambda c: (c[0] < max_tokens) & c[2].any(), step, carry)[3].T

    return translate


def _one_token(
    source: Batch, id_B: jax.Array, position_B: jax.Array, live_B: jax.Array, length: int
) -> Batch:
    """The next token of every row; a row that has ended is padding and writes to no slot."""

    def at(z_B):
        return jax.sharding.reshard(z_B[:, None], P(BATCH, None))

    position_B = jnp.where(live_B, position_B, length)
    return Batch(at(id_B), at(position_B), at(live_B.astype(jnp.int32)), source.row_B)


def _begin_encdec(model: Any, cfg: ModelConfig, source: Batch, max_tokens: int, boundary_id: int):
    """(what runs one token, caches, the first token, its position)."""
    encoded, _ = model.encode(source, jax.random.key(0), False)
    memories = model.memories(encoded)

    def forward(id_B, position_B, live_B, caches):
        return model.cached(
            _one_token(source, id_B, position_B, live_B, max_tokens), caches, memories
        )

    zero_B = jnp.zeros(source.row_B.shape, jnp.int32)
    return (
        forward,
        empty_caches(decoder.as_decoder(cfg), zero_B.shape[0], max_tokens),
        zero_B + boundary_id,
        zero_B,
    )


def _begin_decoder(model: Any, cfg: ModelConfig, source: Batch, max_tokens: int, boundary_id: int):
    """The source goes through once and leaves its keys; its last token goes through again, which
    gives the first logits.
    """
    del boundary_id
    num_rows, length = source.id_BS.shape
    caches = empty_caches(cfg, num_rows, length + max_tokens)
    there_BS = source.segment_BS > 0
    _, caches = model.cached(
        source._replace(position_BS=jnp.where(there_BS, source.position_BS, length + max_tokens)),
        caches,
    )

    def forward(id_B, position_B, live_B, caches):
        return model.cached(
            _one_token(source, id_B, position_B, live_B, length + max_tokens), caches
        )

    last_B = jnp.maximum(there_BS.sum(1) - 1, 0).astype(jnp.int32)
    mine_BS = jnp.arange(length, dtype=last_B.dtype)[None] == last_B[:, None]
    id_B = jnp.where(mine_BS, source.id_BS, 0).sum(1, dtype=jnp.int32)
    return forward, caches, *(jax.sharding.reshard(z, P()) for z in (id_B, last_B))
