"""Parameters and FLOPs of a model, counted from its config; and the speed of this machine to
compare with.

One multiply-add is 2 FLOPs. Counted are the matrix products: projections, attention scores,
feed-forwards, experts, router, head. Left out are norms, softmaxes, rotary embeddings, activations,
gates, gathers and the embedding's lookup, a few percent at any useful width. Attention is causal
and counted so: the token at position i has i + 1 keys, (S + 1) / 2 on average, or as many as a
window shows. (PaLM counts all S keys of every token.) Routed experts count as used, with the k
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

from moe_jax.models import MODELS, depth
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.counting import projections
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sizes
from moe_jax.schema.blocks import DEPTH
from moe_jax.schema.config import ModelConfig, MoEConfig

PEAK_SECONDS = 0.2  # that a measurement of the peak takes, beside its compilation


class Counts(NamedTuple):
    """Parameters by kind, over all layers; "body" is without embedding and head (Kaplan et al.
    2020, arXiv:2001.08361).

    Embedding and head count in `total` and in `active`, whole, although a token looks up one row of
    the embedding.
    """

    embedding: int  # also the head where they are tied
    head: int
    attention: int
    dense: int  # feed-forwards of the dense blocks
    shared: int  # shared experts
    experts: int  # routed experts, all of them
    experts_active: int  # routed experts, those of one token
    router: int  # of experts and of depth
    norms: int

    @property
    def total(self) -> int:
        """Every parameter of the model."""
        return sum(self) - self.experts_active

    @property
    def active(self) -> int:
        """Returns what one token uses: everything but the routed experts that it does not choose.

        It may skip depth blocks, which count whole.
        """
        return sum(self) - self.experts

    @property
    def total_body(self) -> int:
        return self.total - self.embedding - self.head

    @property
    def active_body(self) -> int:
        return self.active - self.embedding - self.head


class Breakdown(NamedTuple):
    """FLOPs of one token's forward pass, over all layers."""

    attention_projections: int
    attention_scores: int  # queries times keys and weights times values, causal
    dense: int
    shared: int
    experts: int
    router: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


def parameters(cfg: ModelConfig) -> Counts:
    """The parameters of a model. A router's state has no gradient and is none."""
    if count := MODELS[cfg.kind].parameters:
        return count(cfg, parameters)
    d, num_dense, num_moe = cfg.d_model, cfg.num_dense_layers, cfg.num_moe_layers
    attention = projections(ATTENTIONS[cfg.attention].weights(cfg))
    expert = feed_forward(cfg, cfg.moe.expert_hidden)
    return Counts(
        embedding=cfg.vocab_size * d,
        head=0 if cfg.tie_embeddings else cfg.vocab_size * d,
        attention=len(cfg.blocks) * (attention.matrices + attention.biases),
        dense=num_dense * feed_forward(cfg, cfg.ffn_hidden),
        shared=num_moe * cfg.moe.shared_experts * expert,
        experts=num_moe * cfg.moe.num_experts * expert,
        experts_active=round(num_moe * experts_per_token(cfg.moe) * expert) if num_moe else 0,
        router=num_moe * router(cfg) + cfg.num_depth_blocks * d,
        norms=d + len(cfg.blocks) * (2 * d + attention.scales),
    )


def feed_forward(cfg: ModelConfig, hidden: int) -> int:
    """Parameters of a feed-forward of hidden width F: gate, up and out for SwiGLU, in and out for
    GELU.
    """
    return (3 if cfg.activation == "swiglu" else 2) * cfg.d_model * hidden


def router(cfg: ModelConfig) -> int:
    """Parameters of one layer's router, as it declares them."""
    moe = cfg.moe
    sizes = Sizes(cfg.d_model, moe.num_experts, cfg.vocab_size)
    declared = ROUTERS[moe.router].params(sizes, moe.router_options)
    return sum(math.prod(weight.shape) for weight in declared.values())


def experts_per_token(moe: MoEConfig) -> float:
    """Routed experts that one token uses, on average where the router does not fix it."""
    declared = ROUTERS[moe.router].declared(moe.num_experts, moe.router_options)
    known = (declared.average, declared.most, moe.num_experts)
    return next(number for number in known if number is not None)


def expert_rows(moe: MoEConfig, num_tokens: int) -> float:
    """Rows that the routed experts compute for a sequence of so many tokens; slots are as many
    however long it is.
    """
    if num_slots := ROUTERS[moe.router].num_slots(moe.router_options):
        return moe.num_experts * num_slots / moe.group_rows
    return experts_per_token(moe) * num_tokens


def mixing(cfg: ModelConfig) -> int:
    """Multiply-adds per token and layer of mixing tokens into slots and the slots' results into
    tokens.
    """
    num_slots = ROUTERS[cfg.moe.router].num_slots(cfg.moe.router_options)
    return 2 * cfg.moe.num_experts * num_slots * cfg.d_model


def forward_per_token(cfg: ModelConfig, seq_len: int) -> Breakdown:
    """FLOPs of the forward pass in training, per token of a row of `seq_len` tokens that attend to
    the tokens before them.

    A weight of a matrix takes one multiply-add per token. Documents packed into one row attend only
    to themselves, which needs fewer FLOPs than counted here.
    """
    if count := MODELS[cfg.kind].forward_flops:
        return count(cfg, seq_len, forward_per_token)
    d, attention = cfg.d_model, ATTENTIONS[cfg.attention]
    chosen = depth.num_chosen(cfg.depth.capacity, seq_len)
    expert = feed_forward(cfg, cfg.moe.expert_hidden)

    def over(kinds: tuple[str, ...], flops: Callable[[int], float]) -> int:
        """FLOPs per token of all blocks of these kinds; `flops(T)` is what T tokens cost in one of
        them.
        """
        of_row = sum(
            flops(chosen if kind.startswith(DEPTH) else seq_len)
            for kind in cfg.blocks
            if kind in kinds
        )
        return round(of_row / seq_len)

    dense, moe = ("dense", DEPTH + "dense"), ("moe", DEPTH + "moe")

    def per_token(weights):
        return lambda num_tokens: 2 * weights * num_tokens

    def scores(num_tokens):
        # Queries times keys and weights times values: two products of 2 FLOPs.
        pairs = attention.num_pairs(num_tokens, cfg.attention_options)
        return 4 * cfg.num_heads * cfg.head_dim * pairs

    matrices = projections(attention.weights(cfg)).matrices
    return Breakdown(
        attention_projections=over(dense + moe, per_token(matrices)),
        attention_scores=over(dense + moe, scores),
        dense=over(dense, per_token(feed_forward(cfg, cfg.ffn_hidden))),
        shared=over(moe, per_token(cfg.moe.shared_experts * expert)),
        experts=over(moe, lambda n: 2 * expert * expert_rows(cfg.moe, n))
        if cfg.num_moe_layers
        else 0,
        router=(over(moe, per_token(router(cfg) + mixing(cfg))) if cfg.num_moe_layers else 0)
        + 2 * cfg.num_depth_blocks * d,
        head=2 * d * cfg.vocab_size,
    )


def train_per_token(cfg: ModelConfig, seq_len: int) -> int:
    """FLOPs of a training step per token: forward, and twice that for the gradients of activations
    and of weights.

    What rematerialisation and micro-batches compute again is not counted, so this gives the *model*
    FLOPs utilization (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). The optimizer's
    arithmetic is not counted either.
    """
    return 3 * forward_per_token(cfg, seq_len).total


def mfu(tokens_per_second: float, cfg: ModelConfig, seq_len: int, peak: float) -> float:
    """Model FLOPs utilization: the useful FLOP/s of training over `peak`.

    Both are those of *all* devices of the run.

    Raises ValueError for a peak that is not positive.
    """
    if not peak > 0:
        raise ValueError(f"peak = {peak} FLOP/s must be positive")
    return tokens_per_second * train_per_token(cfg, seq_len) / peak


def measure_peak(dtype: str) -> float:
    """FLOP/s of a square matrix product on all the devices of this process together: measured, not
    from a data sheet.

    Every device of the mesh (without a mesh: every device) that belongs to this process multiplies
    matrices of its own at the same time, so simulated devices that share cores are measured
    together. The best of a few runs, within about 0.3 s after compilation; it differs from call to
    call as the machine does. In a run of several processes every one measures its own devices: the
    peak of the run is the sum.
    """
    mesh = jax.sharding.get_mesh()
    devices = jax.local_devices() if mesh.empty else mesh.local_devices
    local = jax.make_mesh(
        (len(devices),), ("device",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    with jax.set_mesh(local):
        return _best(*_matrices(dtype, local))


def _matrices(dtype: str, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Two arrays [devices, M, M], one matrix on every device: signs, and signs scaled to keep
    products near 1.
    """
    size = 512 if mesh.devices.flat[0].platform == "cpu" else 4096
    split = jax.NamedSharding(mesh, jax.P("device"))
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.int8), (2, size, size))

    def put(z):
        return jax.device_put(
            np.broadcast_to(z.astype(jnp.dtype(dtype)), (mesh.size, size, size)), split
        )

    return put(signs[0]), put(signs[1] * size**-0.5)


def _best(x: jax.Array, w: jax.Array) -> float:
    """Returns the highest FLOP/s among runs of x w w ... w, long enough to hide their launch."""
    chain = jax.jit(
        lambda x, w, num: jax.lax.fori_loop(
            0, num, lambda _, y: jnp.einsum("nij,njk->nik", y, w), x
        )
    )

    def seconds(num: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(chain(x, w, num))
        return time.perf_counter() - start

    seconds(1)  # compiles
    once, end = seconds(1), time.perf_counter() + PEAK_SECONDS
    num = max(1, round(PEAK_SECONDS / 5 / once))
    while time.perf_counter() < end:
        once = min(once, seconds(num) / num)
    return 2 * x.shape[0] * x.shape[1] ** 3 / once
