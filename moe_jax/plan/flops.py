"""Parameters and FLOPs of a model, counted from its config; and the speed of this machine to
compare with.

One multiply-add is 2 FLOPs. Counted are the matrix products: projections, attention scores,
feed-forwards, experts, router, head. Left out are norms, softmaxes, soft caps, rotary embeddings,
activations, gates, gathers and the embedding's lookup, a few percent at any useful width. Attention
is causal and counted so: the token at position i has i + 1 keys, (S + 1) / 2 on average, or as many
as a window shows. (PaLM counts all S keys of every token.) Routed experts count as used, with the k
experts of a token: what a dispatcher pads is not useful work, and what capacity drops still counts.
A depth block counts in training for the C of S tokens that go through it, which attend to each
other; its router for all.

Shapes: D model, F hidden, E experts, V vocabulary, S sequence.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models import MODELS, depth, mtp
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.counting import norms_of_part, projections
from moe_jax.models.stack import shared_weights
from moe_jax.moe.activations import ACTIVATIONS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sizes
from moe_jax.plan import chips
from moe_jax.schema.blocks import inner, is_depth
from moe_jax.schema.config import ModelConfig, MoEConfig

# That a measurement of the peak takes, beside its compilation.
PEAK_SECONDS = 0.2


class Counts(NamedTuple):
    """Parameters by kind, over all layers; "body" is without embedding and head (Kaplan et al.
    2020, arXiv:2001.08361).

    Embedding and head count in `total` and in `active`, whole, although a token looks up one row of
    the embedding.
    """

    # Also the head where they are tied.
    embedding: int
    head: int
    attention: int
    # Feed-forwards of the dense blocks.
    dense: int
    # Shared experts.
    shared: int
    # Routed experts, all of them.
    experts: int
    # Routed experts, those of one token.
    experts_active: int
    # Of experts and of depth.
    router: int
    norms: int
    # What joins tokens and hidden states for multi-token prediction (models/mtp.py), whose blocks
    # count as all others.
    joins: int = 0
    # The projections before and after latent experts (moe/latent.py).
    latent: int = 0

    @property
    def total(self) -> int:
        """Returns the number of all parameters of the model."""
        return sum(self) - self.experts_active

    @property
    def active(self) -> int:
        """Returns the parameters that one token uses: all but those of experts that it leaves out.

        It may skip depth blocks, which count whole.
        """
        return sum(self) - self.experts

    @property
    def total_body(self) -> int:
        """Returns the number of all parameters but those of embedding and head."""
        return self.total - self.embedding - self.head

    @property
    def active_body(self) -> int:
        """Returns the parameters that one token uses, without embedding and head."""
        return self.active - self.embedding - self.head


class Breakdown(NamedTuple):
    """FLOPs of one token's forward pass, over all layers."""

    # Of queries, keys, values and outputs.
    attention_projections: int
    # Queries times keys and weights times values, causal.
    attention_scores: int
    dense: int
    shared: int
    experts: int
    router: int
    # Of every depth of multi-token prediction too.
    head: int
    joins: int = 0
    latent: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def parameters(cfg: ModelConfig) -> Counts:
    """Returns the parameters of a model. A router's state has no gradient and is none."""
    # A kind of model that is no decoder counts itself, from the counts of decoders.
    if count := MODELS[cfg.kind].parameters:
        return count(cfg, parameters)
    d, num_blocks, num_moe = cfg.d_model, len(cfg.blocks), cfg.num_moe_layers
    attentions = [projections(ATTENTIONS[one.attention].weights(one)) for one in of_blocks(cfg)]
    # Of attention, of the feed-forward, and of queries and keys where they are normalised.
    norms = 2 * norms_of_part(cfg) * d * num_blocks + sum(one.scales for one in attentions)
    joins = mtp.num_weights(cfg)
    one_expert = expert(cfg) + expert_biases(cfg)
    return Counts(
        embedding=cfg.vocab_size * d,
        head=0 if cfg.tie_embeddings else cfg.vocab_size * d,
        attention=sum(one.matrices + one.biases for one in attentions) + of_stack(cfg),
        dense=cfg.num_dense_layers * feed_forward(cfg, cfg.ffn_hidden),
        shared=num_moe * shared(cfg),
        experts=num_moe * cfg.moe.num_experts * one_expert,
        experts_active=round(num_moe * experts_per_token(cfg.moe) * one_expert) if num_moe else 0,
        # A depth block scores each token by a vector of D.
        router=num_moe * router(cfg) + cfg.num_depth_blocks * d,
        # One more before the head.
        norms=norms + d + joins.scales,
        joins=joins.matrices,
        latent=num_moe * latents(cfg),
    )


def of_stack(cfg: ModelConfig) -> int:
    """Returns the parameters that the blocks of a stack have in common."""
    return sum(math.prod(weight.shape) for weight in shared_weights(cfg).values())


def of_blocks(cfg: ModelConfig) -> list[ModelConfig]:
    """Returns the config of each block, which has its own attention."""
    return [cfg.of_block(kind) for kind in cfg.blocks]


def feed_forward(cfg: ModelConfig, hidden: int, width: int = 0) -> int:
    """Returns the parameters of a feed-forward of hidden width F; `width`: of its input, 0 = D.

    They are those of gate, up and out for SwiGLU, of in and out for GELU.
    """
    num_matrices = ACTIVATIONS[cfg.activation].parts + 1
    return num_matrices * (width or cfg.d_model) * hidden


def expert(cfg: ModelConfig) -> int:
    """Returns the parameters of the matrices of one routed expert."""
    return feed_forward(cfg, cfg.moe.expert_hidden, cfg.expert_dim)


def latents(cfg: ModelConfig) -> int:
    """Returns the parameters of one layer's projections before and after latent experts."""
    return 2 * cfg.d_model * cfg.moe.latent_dim


def expert_biases(cfg: ModelConfig) -> int:
    """Returns how many numbers the biases of one expert are."""
    if not cfg.moe.expert_bias:
        return 0
    return ACTIVATIONS[cfg.activation].parts * cfg.moe.expert_hidden + cfg.expert_dim


def shared(cfg: ModelConfig) -> int:
    """Returns the parameters of one layer's shared experts, with their gate."""
    gate = cfg.d_model if cfg.moe.shared_gate else 0
    return feed_forward(cfg, cfg.moe.shared_width) + gate


def router(cfg: ModelConfig) -> int:
    """Returns the parameters of one layer's router, as it declares them."""
    moe = cfg.moe
    sizes = Sizes(cfg.d_model, moe.num_experts, cfg.vocab_size)
    declared = ROUTERS[moe.router].params(sizes, moe.router_options)
    return sum(math.prod(weight.shape) for weight in declared.values())


def experts_per_token(moe: MoEConfig) -> float:
    """Returns how many routed experts one token uses.

    It is the average where the router declares one, else the most, else all of them.
    """
    declared = ROUTERS[moe.router].declared(moe.num_experts, moe.router_options)
    for number in (declared.average, declared.most):
        if number is not None:
            return number
    return moe.num_experts


def expert_rows(moe: MoEConfig, num_tokens: int) -> float:
    """Returns how many rows the routed experts compute for a sequence of so many tokens."""
    # Slots are as many however long the sequence is; the rows of a group share them.
    if num_slots := ROUTERS[moe.router].num_slots(moe.router_options):
        return moe.num_experts * num_slots / moe.group_rows
    return experts_per_token(moe) * num_tokens


def mixing(cfg: ModelConfig) -> int:
    """Returns the multiply-adds per token and layer that fill and empty slots.

    Tokens are mixed into slots, and the slots' results into tokens.
    """
    num_slots = ROUTERS[cfg.moe.router].num_slots(cfg.moe.router_options)
    return 2 * cfg.moe.num_experts * num_slots * cfg.expert_dim


def forward_per_token(cfg: ModelConfig, seq_len: int) -> Breakdown:
    """Returns the FLOPs of the forward pass in training, per token of a row of `seq_len` tokens.

    A weight of a matrix takes one multiply-add per token. Each token attends to all tokens before
    it. Documents that are packed into one row attend only to themselves, which needs fewer FLOPs
    than are counted here.
    """
    # A kind of model that is no decoder counts itself, from the FLOPs of decoders.
    if count := MODELS[cfg.kind].forward_flops:
        return count(cfg, seq_len, forward_per_token)
    d = cfg.d_model
    num_chosen = depth.num_chosen(cfg.depth.capacity, seq_len)
    of_one_expert = expert(cfg)
    all_kinds = ("dense", "moe")

    def over(kinds: tuple[str, ...], of_block: Callable[[int, ModelConfig], float]) -> int:
        """Returns the FLOPs per token of all blocks that are one of these inside.

        `of_block(N, its config)` is what N tokens cost in one of them.
        """
        of_row: float = 0
        for kind, own in zip(cfg.blocks, of_blocks(cfg), strict=True):
            if inner(kind) in kinds:
                of_row += of_block(num_chosen if is_depth(kind) else seq_len, own)
        return round(of_row / seq_len)

    def of_weights(weights: int) -> Callable[[int, ModelConfig], float]:
        """Returns what a block with so many weights costs by the number of tokens."""

        def of_block(num_tokens: int, own: ModelConfig) -> float:
            del own
            return 2 * weights * num_tokens

        return of_block

    def of_projections(num_tokens: int, own: ModelConfig) -> float:
        return 2 * projections(ATTENTIONS[own.attention].weights(own)).matrices * num_tokens

    def of_scores(num_tokens: int, own: ModelConfig) -> float:
        # Queries times keys and weights times values: two products of 2 FLOPs.
        attention = ATTENTIONS[own.attention]
        pairs = attention.num_pairs(num_tokens, own.attention_options)
        return 2 * own.num_heads * sum(attention.widths(own)) * pairs

    def of_experts(num_tokens: int, own: ModelConfig) -> float:
        return 2 * of_one_expert * expert_rows(own.moe, num_tokens)

    moe_kinds = ("moe",)
    experts = over(moe_kinds, of_experts) if cfg.num_moe_layers else 0
    routers = over(moe_kinds, of_weights(router(cfg) + mixing(cfg))) if cfg.num_moe_layers else 0
    return Breakdown(
        attention_projections=over(all_kinds, of_projections),
        attention_scores=over(all_kinds, of_scores),
        dense=over(("dense",), of_weights(feed_forward(cfg, cfg.ffn_hidden))),
        shared=over(moe_kinds, of_weights(shared(cfg))),
        experts=experts,
        # The router of a depth block sees every token, also those that do not go through.
        router=routers + 2 * cfg.num_depth_blocks * d,
        head=2 * d * cfg.vocab_size * (1 + mtp.num_depths(cfg)),
        joins=2 * mtp.num_weights(cfg).matrices,
        latent=over(moe_kinds, of_weights(latents(cfg))),
    )


def train_per_token(cfg: ModelConfig, seq_len: int) -> int:
    """Returns the FLOPs of a training step per token.

    They are those of the forward pass, and twice that for the gradients of activations and weights.
    What rematerialisation and micro-batches compute again is not counted, so this gives the *model*
    FLOPs utilization (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). The optimizer's
    arithmetic is not counted either.
    """
    return 3 * forward_per_token(cfg, seq_len).total


def mfu(tokens_per_second: float, cfg: ModelConfig, seq_len: int, peak: float) -> float:
    """Returns the model FLOPs utilization: the useful FLOP/s of training over `peak`.

    Both are those of *all* devices of the run.

    Raises ValueError for a peak that is not positive.
    """
    if not peak > 0:
        raise ValueError(f"peak = {peak} FLOP/s must be positive")
    return tokens_per_second * train_per_token(cfg, seq_len) / peak


def peak(dtype: str) -> float:
    """Returns the FLOP/s of all devices of the current mesh: published figures of a known chip,
    else what is measured.
    """
    devices = jax.sharding.get_mesh().devices
    published = chips.peak(devices.flat[0].device_kind, dtype)
    if published is not None:
        return published * devices.size
    # Each process measures its own devices.
    return measure_peak(dtype) * jax.process_count()


def measure_peak(dtype: str) -> float:
    """Returns the FLOP/s of a square matrix product on all the devices of this process together.

    It is measured, not from a data sheet. Every device of the mesh (without a mesh: every device)
    that belongs to this process multiplies matrices of its own at the same time, so simulated
    devices that share cores are measured together. The best of a few runs counts, within about 0.3
    s after compilation; it differs from call to call as the machine does. In a run of several
    processes every one measures its own devices: the peak of the run is the sum.
    """
    mesh = jax.sharding.get_mesh()
    devices = jax.local_devices() if mesh.empty else mesh.local_devices
    local = jax.make_mesh(
        (len(devices),), ("device",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    with jax.set_mesh(local):
        return _best(*_matrices(dtype, local))


def _matrices(dtype: str, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Returns two arrays [devices, M, M], one matrix on every device.

    They are signs, and signs that are scaled to keep products near 1.
    """
    # Large enough that the product, not its launch or its memory, takes the time.
    size = 512 if mesh.devices.flat[0].platform == "cpu" else 4096
    sharding = jax.NamedSharding(mesh, jax.P("device"))
    random = np.random.default_rng(0)
    signs = random.choice(np.array([-1, 1], np.int8), (2, size, size))

    def put(matrix):
        on_each = np.broadcast_to(matrix.astype(jnp.dtype(dtype)), (mesh.size, size, size))
        return jax.device_put(on_each, sharding)

    return put(signs[0]), put(signs[1] * size**-0.5)


def _best(x: jax.Array, w: jax.Array) -> float:
    """Returns the highest FLOP/s among runs of x w w ... w, long enough to hide their launch."""

    @jax.jit
    def chain(x, w, num_products):
        def product(_, y):
            return jnp.einsum("nij,njk->nik", y, w)

        return jax.lax.fori_loop(0, num_products, product, x)

    def seconds(num_products: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(chain(x, w, num_products))
        return time.perf_counter() - start

    seconds(1)  # compiles
    best = seconds(1)
    end = time.perf_counter() + PEAK_SECONDS
    # About five runs fit into the time.
    num_products = max(1, round(PEAK_SECONDS / 5 / best))
    while time.perf_counter() < end:
        best = min(best, seconds(num_products) / num_products)
    num_devices, size, _ = x.shape
    return 2 * num_devices * size**3 / best
