"""The rules that tie the axes of the mesh to the model and the batch.

Each message names the keys, both values and the way out.
"""

from collections.abc import Iterator

from moe_jax.models import MODELS
from moe_jax.models.attention_core import OF_JAX
from moe_jax.models.stack import shared_weights
from moe_jax.parallel import context
from moe_jax.schema.blocks import is_depth
from moe_jax.schema.config import Config


def axes(cfg: Config) -> Iterator[str]:
    """Yields what an axis does not divide, and what does not go with it."""
    model, mesh, moe = cfg.model, cfg.mesh, cfg.model.moe
    if mesh.seq > 1:
        yield from _context(cfg)
    # (key, its value, axis, its length): what each axis of the mesh splits evenly.
    over_seq = " x mesh.seq" if mesh.seq > 1 else ""
    fsdp_axes = f"mesh.data x mesh.expert{over_seq}"
    # FSDP splits the width of every matrix over these axes.
    needs = [("model.d_model", model.d_model, fsdp_axes, mesh.fsdp_devices)]
    if model.kind_options.masks:
        needs.append(("model.num_heads", model.num_heads, "mesh.model", mesh.model))
        needs.append(("model.num_kv_heads", model.num_kv_heads, "mesh.model", mesh.model))
    if model.kind_options.embeds:
        needs.append(("model.vocab_size", model.vocab_size, "mesh.model", mesh.model))
    if model.num_dense_layers:
        needs.append(("model.ffn_hidden", model.ffn_hidden, "mesh.model", mesh.model))
    if model.num_moe_layers:
        # Experts are split over both axes (parallel/context.py).
        expert_axes, parts = f"mesh.expert{over_seq}", mesh.expert * mesh.seq
        needs.append(("model.moe.num_experts", moe.num_experts, expert_axes, parts))
        needs.append(("model.moe.expert_hidden", moe.expert_hidden, "mesh.model", mesh.model))
        if moe.latent_dim:
            needs.append(("model.moe.latent_dim", moe.latent_dim, "mesh.data", mesh.data))
        if moe.shared_hidden:
            needs.append(("model.moe.shared_hidden", moe.shared_hidden, "mesh.model", mesh.model))
    if moe.sparse.stored.block and mesh.model > 1:
        yield (
            f"mesh.model ({mesh.model}) must be 1 for experts stored as blocks "
            "(model.moe.sparse.stored), which it cannot split"
        )
    for path, value, axis, length in needs:
        if value % length:
            yield f"{path} ({value}) must be divisible by {axis} ({length})"


def _context(cfg: Config) -> Iterator[str]:
    """Yields what does not go with rows that are split over `seq`."""
    model, seq = cfg.model, cfg.mesh.seq
    if not MODELS[model.kind].splits_rows:
        able = " or ".join(name for name, kind in MODELS.items() if kind.splits_rows)
        yield (
            f'mesh.seq ({seq}) must be 1 with model.kind = "{model.kind}", whose rows are not '
            f"split: use another axis, or model.kind={able}"
        )
    if any(is_depth(block) for block in model.blocks):
        yield (
            f"mesh.seq ({seq}) must be 1 with depth blocks, which choose among the tokens of whole "
            "rows: use another axis, or leave depth blocks out"
        )
    if model.attention_kernel in OF_JAX:
        yield (
            f'mesh.seq ({seq}) must be 1 with model.attention_kernel = "{model.attention_kernel}", '
            "which knows no "
            'parts of rows: set model.attention_kernel="auto"'
        )
    chunks = context.CHUNKS * seq
    if cfg.data.seq_len % chunks:
        yield (
            f"data.seq_len ({cfg.data.seq_len}) must be divisible by {context.CHUNKS} x mesh.seq "
            f"({chunks}): a device has {context.CHUNKS} chunks of each row"
        )


def pipeline(cfg: Config) -> Iterator[str]:
    """Yields what keeps a model or a batch from going through the stages of a pipeline: they are
    equal parts of the repeats of one stack, and work on micro-batches.
    """
    model, train, stages = cfg.model, cfg.train, cfg.mesh.stage
    if stages == 1:
        return
    # Behind the stack there may be another one (models/mtp.py), which runs as the suffix does.
    if next(iter(model.stacks), None) != "":
        yield (
            f'mesh.stage ({stages}) must be 1 for model.kind = "{model.kind}": a pipeline splits '
            f"one stack of blocks, and this model has {len(model.stacks)}"
        )
        return
    if common := shared_weights(model):
        yield (
            f'mesh.stage ({stages}) must be 1 with model.attention = "{model.attention}": the '
            f"blocks of a stack share weights ({', '.join(common)}), which no stage could have "
            "alone"
        )
    if not model.scan:
        yield f"mesh.stage ({stages}) splits stacked layers: set model.scan = True"
    places = stages * train.pipeline_chunks
    if model.repeats % places or not model.repeats:
        yield (
            f"model.repeats ({model.repeats}) must be divisible by mesh.stage x "
            f"train.pipeline_chunks ({stages} x {train.pipeline_chunks}); other blocks may stand "
            "in model.prefix and model.suffix"
        )
    if train.batch_size % train.micro_batch_size:
        # config/rules.py says so.
        return
    num = train.num_micro_batches
    if num % stages:
        yield (
            f"the micro-batches of a step ({num} = train.batch_size {train.batch_size} / "
            f"train.micro_batch_size {train.micro_batch_size}) must be divisible by mesh.stage "
            f"({stages}): set train.micro_batch_size to {train.batch_size // stages} rows or fewer"
        )
