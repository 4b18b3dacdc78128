"""Multi-token prediction: at place i a decoder also learns the tokens behind the next one
(DeepSeek-V3, arXiv:2412.19437, section 2.2). With D depths, depth k = 1 .. D predicts the token
t[i+k+1] from what is known of t[i+k] and of all before it:

    h'[k, i] = M_k [RMSNorm(Emb(t[i+k])); RMSNorm(h[k-1, i])]      eq. 21, M_k [2 D, D]
    h[k]     = RMSNorm(Block_k(h'[k]))                             eq. 22
    P[k, i]  = softmax(h[k, i] @ head), of t[i+k+1]                eq. 23
    loss     = weight / D * sum over k of L_k                      eq. 25

L_k is the mean of -log P[k, i] (eq. 24) over the places of depth k. These are the places i of a row
of which i + k lies in the same document and has a target that is learned: each depth divides by a
number of its own (tasks/contract.py). A place whose document ends before i + k is padding at depth
k: its experts and their balance do not see it.

Embedding and head are those of the model. Each depth has a block of its own, of the kind of the
model's last one, and counts as a further layer of the model. h[0] is what the head reads of the
model, behind the last norm, and so is every h[k]: eq. 23 gives it to the head as it is. No other
program was compared.

Shapes: B rows, S sequence, D model, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax import layout
from moe_jax.models.block import Beside, Look
from moe_jax.models.counting import Projections
from moe_jax.models.ends import before_head, embed, norm_scale
from moe_jax.models.layers import dropout, gather, norm
from moe_jax.models.stack import blocks, caller
from moe_jax.moe.layer import Batch
from moe_jax.parallel import context
from moe_jax.schema.blocks import Stack
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight, Weights

# The key of the modules among the model's parameters, and of their stack.
NAME = "mtp"


def stack(own: Stack, depths: int) -> Stack:
    """Returns the blocks of so many depths, each of the kind of the model's last one."""
    return Stack(prefix=own.blocks[-1:] * depths, period=(), repeats=0, suffix=())


def without(cfg: ModelConfig) -> ModelConfig:
    """Returns the same model without depths."""
    # Those of a decoder, which alone has depths.
    options: Any = cfg.kind_options
    return dataclasses.replace(cfg, kind_options=dataclasses.replace(options, mtp_depths=0))


def ahead(z_BS: Array, k: int) -> Array:
    """Returns what stands k places later in its row; 0 where the row has ended."""
    length = z_BS.shape[1]
    return jnp.pad(z_BS[:, k:], ((0, 0), (0, min(k, length))))


def continues(segment_BS: Array, k: int) -> Array:
    """Returns whether the place k later is of the same document [B, S]."""
    return (segment_BS > 0) & (segment_BS == ahead(segment_BS, k))


def declare(cfg: ModelConfig) -> dict[str, Weight]:
    """Declares what joins a token and the hidden state before it; of `w_join` the embedding's part
    is the first, as in the released checkpoints.
    """
    d = cfg.d_model
    return {
        "embed_norm_scale": norm_scale(cfg),
        "hidden_norm_scale": norm_scale(cfg),
        "w_join": Weight((2, d, d), (None, "embed", None), (2 * d) ** -0.5),
        "out_norm_scale": norm_scale(cfg),
    }


class Modules(nnx.Module):
    """The modules of all depths.

    `modules(h_BSD, table_VD, batch, rng, train, beside) -> ([h_BSD of each depth], sums)`: h_BSD is
    what the head reads of the model, in the order of tokens that blocks have (parallel/context.py),
    table_VD the embedding, and `beside` what blocks of the model read beside their tokens.
    """

    def __init__(self, key: Array, cfg: ModelConfig, look: Look):
        self.cfg = cfg
        kinds = cfg.stacks[NAME].blocks
        self.prefix = blocks(jax.random.fold_in(key, 0), kinds, without(cfg), look)
        joins = []
        for k in range(len(kinds)):
            own_key = jax.random.fold_in(key, 1 + k)
            joins.append(Weights(own_key, declare(cfg), cfg.param_dtype))
        self.joins = nnx.List(joins)

    def __call__(
        self,
        h_BSD: Array,
        table_VD: Array,
        batch: Batch,
        rng: Array,
        train: bool,
        beside: Beside,
    ) -> tuple[list[Array], dict[str, Array]]:
        cfg = self.cfg
        call = caller(cfg, train)
        # Blocks are counted through, from 1.
        num_before = len(cfg.stacks[""].blocks)
        hidden, parts = [], []
        for k, (join, block) in enumerate(zip(self.joins, self.prefix, strict=True), start=1):
            later = _later(batch, k)
            e_BSD = embed(table_VD, context.enter(later.id_BS), cfg)
            # The embedding of the model has the key of number 0 itself.
            key = jax.random.fold_in(jax.random.fold_in(rng, 0), k)
            e_BSD = dropout(e_BSD, cfg.dropout if train else 0.0, key, batch.row_B)
            with jax.named_scope("mtp"):
                x_BSD = _joined(join, e_BSD, h_BSD, cfg)
            x_BSD, sums = call(block, x_BSD, later, rng, jnp.int32(num_before + k), beside)
            h_BSD = before_head(x_BSD, join["out_norm_scale"], cfg)
            hidden.append(h_BSD)
            parts.append(sums)
        return hidden, layout.join_sums(jnp.stack, parts)


def _later(batch: Batch, k: int) -> Batch:
    """Returns the batch as depth k has it: the token k places later, and padding where the document
    has none.
    """
    there_BS = continues(batch.segment_BS, k)
    return batch._replace(
        id_BS=ahead(batch.id_BS, k), segment_BS=jnp.where(there_BS, batch.segment_BS, 0)
    )


def _joined(join: Weights, e_BSD: Array, h_BSD: Array, cfg: ModelConfig) -> Array:
    """Returns the projection of a token's embedding and of the hidden state before it."""
    join_2DD = gather(join["w_join"], (None, "embed", None), cfg.dtype)
    e_BSD = norm(e_BSD, join["embed_norm_scale"], cfg)
    h_BSD = norm(h_BSD, join["hidden_norm_scale"], cfg)
    tokens = context.tokens_spec(h_BSD, None)

    def product(x_BSD: Array, part: int) -> Array:
        return jnp.einsum("BSD,DE->BSE", x_BSD, join_2DD[part], out_sharding=tokens)

    return product(e_BSD, 0) + product(h_BSD, 1)


def num_depths(cfg: ModelConfig) -> int:
    """Returns how many depths a model has; 0 = it predicts the next token alone."""
    return len(cfg.stacks[NAME].blocks) if NAME in cfg.stacks else 0


def num_weights(cfg: ModelConfig) -> Projections:
    """Returns the numbers of parameters of all depths, beside those of their blocks."""
    depths, d = num_depths(cfg), cfg.d_model
    return Projections(matrices=depths * 2 * d**2, biases=0, scales=depths * 3 * d)


def figures(totals: dict[str, Any]) -> dict[str, Any]:
    """Returns the held-out figures of each depth: nats per token, and how often the likeliest token
    is the right one.
    """
    made = {}
    for name, total in totals.items():
        num_tokens = total["tokens"].clip(1)
        made[f"{name}/loss"] = total["nll"] / num_tokens
        made[f"{name}/accuracy"] = total["correct"] / num_tokens
    return made
