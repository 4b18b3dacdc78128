"""The bytes that a step must send, from the sizes of the model: what the compiled program is held
against.

Every figure is of one device and one optimizer step, as bytes received from other devices: of n
equal parts a device has one. Not predicted are sums of gradients of what is not split (norms,
routers), the routers' statistics, and losses.

Shapes: T tokens of a device in a micro-batch, D model, n devices of an axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax import accumulation
from moe_jax.models import MODELS, mtp
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.counting import projections
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.parallel.mesh import FSDP
from moe_jax.pipeline import schedule
from moe_jax.plan import flops
from moe_jax.plan.dispatch import buffer_shape
from moe_jax.plan.hlo.collectives import ACTIVATIONS, COLUMNS, COLUMNS_AXIS, GRADIENTS, KEYS
from moe_jax.schema.blocks import inner
from moe_jax.schema.config import Config


class Expected(NamedTuple):
    """Holds what a step must send of one thing over some axes."""

    cargo: str
    axes: str
    num_bytes: int


def expected(cfg: Config) -> list[Expected]:
    """Returns what a step must send on its mesh; nothing of axes of length one.

    Of a kind of model that counts its parameters itself only the experts are known.
    """
    mesh, found = cfg.mesh, []
    if mesh.stage > 1:
        found.append(Expected(ACTIVATIONS, "stage", activations(cfg)))
    if cfg.model.num_moe_layers:
        found.append(Expected("tokens", "expert", tokens(cfg)))
        found.append(Expected("tokens", "seq", tokens_over_seq(cfg)))
        found.append(Expected("expert weights", "data", expert_weights(cfg)))
    # It has other matrices than a decoder, which the lines below count.
    if MODELS[cfg.model.kind].parameters:
        return [one for one in found if one.num_bytes]
    axes = " x ".join(axis for axis in FSDP if getattr(mesh, axis) > 1)
    found.append(Expected("dense weights", axes, dense_weights(cfg)))
    found.append(Expected(GRADIENTS, axes, dense_gradients(cfg)))
    found.append(Expected(COLUMNS, COLUMNS_AXIS, hidden_columns(cfg)))
    found.append(Expected(KEYS, "seq", keys_and_values(cfg)))
    return [one for one in found if one.num_bytes]


def forward_passes(cfg: Config) -> int:
    """Returns how often a device computes the forward pass of a micro-batch, beside what is
    rematerialised.

    A pipeline computes every micro-batch again in the backward pass, and with "1f1b" its stages
    do so twice.
    """
    if cfg.mesh.stage == 1:
        return accumulation.forward_passes(cfg)
    # "1f1b" runs all forward works anew in its backward pass, and each backward work its own again.
    return 3 if cfg.train.pipeline_schedule == schedule.ONE_F_ONE_B else 2


def runs(cfg: Config, number: Callable[[tuple[str, ...]], int]) -> int:
    """Returns how often a device runs blocks in one forward pass, over all micro-batches.

    `number` says how many of some blocks count. A stage of a pipeline runs its repeats in every
    tick, those of the bubble too, and the other blocks for its share of the micro-batches.
    """
    model, num_micro = cfg.model, cfg.train.num_micro_batches
    if cfg.mesh.stage == 1:
        return number(model.blocks) * num_micro
    sizes = schedule.of(cfg)
    repeats = model.repeats // sizes.round
    # Blocks of multi-token prediction lie behind the suffix.
    behind = model.blocks[len(model.stacks[""].blocks) :]
    # A stage has one micro-batch of each group.
    ends = number(model.prefix + model.suffix + behind) * sizes.groups
    return number(model.period) * repeats * sizes.ticks + ends


def num_moe(blocks: tuple[str, ...]) -> int:
    """Returns how many of some blocks have experts."""
    return sum(inner(kind) == "moe" for kind in blocks)


def _dense(blocks: tuple[str, ...]) -> int:
    """Returns how many of some blocks have a dense feed-forward."""
    return len(blocks) - num_moe(blocks)


def activations(cfg: Config) -> int:
    """Returns the bytes of the micro-batches that move between the stages of a pipeline."""
    micro_batch = buffer_tokens(cfg) * cfg.model.d_model * number_bytes(cfg)
    return schedule.of(cfg).moved(cfg.train.pipeline_schedule) * micro_batch


def number_bytes(cfg: Config) -> int:
    """Returns the bytes of a number that is computed with."""
    return jnp.dtype(cfg.model.dtype).itemsize


def tokens(cfg: Config) -> int:
    """Returns the bytes of expert parallelism.

    Rows go to the experts and come back, forward and backward. A block that is rematerialised sends
    them to the experts once more, unless they are kept; nobody needs them back then.
    """
    dispatcher = DISPATCHERS[cfg.model.moe.dispatcher]
    rows = dispatcher.received(buffer_shape(cfg), cfg.model.moe.dispatcher_options)
    # model.remat names what is kept, joined by "+".
    keeps = "dispatch" in cfg.model.remat.split("+") and dispatcher.keeps
    again = 0 if cfg.model.remat == "none" or keeps else 1
    # There and back in every forward pass, there again where nothing was kept, and the gradients of
    # both ways.
    journeys = 2 * forward_passes(cfg) + again + 2
    per_layer = journeys * rows * cfg.model.expert_dim * number_bytes(cfg)
    return per_layer * runs(cfg, num_moe)


def tokens_over_seq(cfg: Config) -> int:
    """Returns the bytes by which an MoE layer has whole rows where they are split over `seq`.

    The tokens are gathered, and the sums of what the experts made of them scattered, forward and
    backward; a block that is rematerialised gathers them once more.
    """
    model = cfg.model
    again = 0 if model.remat == "none" else 1
    gathers, scatters = forward_passes(cfg) + again + 1, forward_passes(cfg) + 1
    # What is scattered is as wide as the experts' output.
    row = (gathers * model.d_model + scatters * model.expert_dim) * number_bytes(cfg)
    return row * _from_others(cfg) * runs(cfg, num_moe)


def keys_and_values(cfg: Config) -> int:
    """Returns the bytes of keys and values of whole rows where they are split over `seq`.

    They are gathered forward, once more backward, whether the block is rematerialised or not, and
    their gradients scattered. Of blocks that are no loop (model.scan = False) a compiler may keep
    those of the forward pass.
    """
    model, num_bytes = cfg.model, 0
    # Two more than forward: gathered once more, and the gradients scattered.
    passes = forward_passes(cfg) + 2
    for name in model.attentions:
        one = model.with_attention(name)
        num_heads = ATTENTIONS[name].key_heads(one)
        width = sum(ATTENTIONS[name].widths(one)) * num_heads // cfg.mesh.model
        num_bytes += passes * width * number_bytes(cfg) * _from_others(cfg)
    # Of the mean block, as often as a device runs one.
    return num_bytes * runs(cfg, len) // len(model.blocks)


def _from_others(cfg: Config) -> int:
    """Returns the tokens of whole rows that come from other devices of `seq`."""
    return buffer_tokens(cfg) * (cfg.mesh.seq - 1)


def expert_weights(cfg: Config) -> int:
    """Returns the bytes of the experts' weights, gathered over `data`, and of their gradients,
    which are scattered back.
    """
    data = cfg.mesh.data
    # One more for the gradients.
    passes = _gathers(cfg) + 1
    per_layer = passes * local_experts(cfg) * number_bytes(cfg) * (data - 1) // data
    return per_layer * runs(cfg, num_moe)


def local_experts(cfg: Config) -> int:
    """Returns the weights of the experts of one layer that a device multiplies by."""
    model, mesh = cfg.model, cfg.mesh
    count = flops.expert(model) * model.moe.num_experts
    # Experts are split over `expert` and `seq`, their hidden columns over `model`.
    return count // (mesh.expert * mesh.seq) // mesh.model


def dense_weights(cfg: Config) -> int:
    """Returns the bytes of all other matrices, gathered over `data`, `expert` and `seq`."""
    in_blocks, ends = dense_counts(cfg)
    # Embedding and head lie outside of what is rematerialised.
    gathered = _gathers(cfg) * in_blocks + forward_passes(cfg) * ends
    return gathered * number_bytes(cfg) * _others(cfg) // cfg.mesh.fsdp_devices


def dense_gradients(cfg: Config) -> int:
    """Returns the bytes of the gradients of these matrices, summed and scattered to the devices
    that keep them.
    """
    return sum(dense_counts(cfg)) * number_bytes(cfg) * _others(cfg) // cfg.mesh.fsdp_devices


def dense_counts(cfg: Config) -> tuple[int, int]:
    """Returns the weights that a device gathers over all micro-batches, in blocks and at the ends
    of the model.
    """
    model, mesh = cfg.model, cfg.mesh
    attention = projections(ATTENTIONS[model.attention].weights(model)).matrices
    in_blocks = runs(cfg, len) * attention
    in_blocks += runs(cfg, _dense) * flops.feed_forward(model, model.ffn_hidden)
    if model.num_moe_layers:
        in_blocks += runs(cfg, num_moe) * flops.shared(model)
    # Neither these nor the joins of further tokens are split over `model`.
    latents = runs(cfg, num_moe) * flops.latents(model)
    # Embedding and head are one matrix where they are tied.
    num_ends = 1 if model.tie_embeddings else 2
    times = cfg.train.num_micro_batches
    ends = num_ends * model.vocab_size * model.d_model * times // mesh.stage
    joins = mtp.num_weights(model).matrices * times // mesh.stage
    return in_blocks // mesh.model + latents, ends // mesh.model + joins


def _others(cfg: Config) -> int:
    """Returns how many devices have a part of a weight or of its gradient beside one's own."""
    return cfg.mesh.fsdp_devices - 1


def _gathers(cfg: Config) -> int:
    """Returns how often a block gathers its weights: forward, and where it is rematerialised."""
    return forward_passes(cfg) + (0 if cfg.model.remat == "none" else 1)


def hidden_columns(cfg: Config) -> int:
    """Returns the bytes of the sums over `model`: after attention and after the feed-forward, and
    backward before each; of rematerialised blocks once more after attention.
    """
    model, n = cfg.model, cfg.mesh.model
    num_tokens = buffer_tokens(cfg)
    again = 0 if model.remat == "none" else 1
    # One in every forward pass for each part, one more of attention where a block is computed
    # again, and one of gradients for each.
    of_attention, of_ffn = forward_passes(cfg) + again + 1, forward_passes(cfg) + 1
    # Backward an MoE layer has the tokens of whole rows.
    more = cfg.mesh.seq - 1
    wide = of_attention * runs(cfg, len) + of_ffn * runs(cfg, _dense)
    # Of experts as wide as they are.
    numbers = wide * model.d_model + (of_ffn + more) * runs(cfg, num_moe) * model.expert_dim
    # A sum is a reduce-scatter and a gather.
    return 2 * num_tokens * numbers * number_bytes(cfg) * (n - 1) // n


def buffer_tokens(cfg: Config) -> int:
    """Returns the tokens of a device in one micro-batch."""
    rows = cfg.train.micro_batch_size // cfg.mesh.batch_devices
    return rows * cfg.data.seq_len // cfg.mesh.seq
