"""The memory traffic of a step by a formula, for ranking plans that are not compiled.

Every array that a block must have counts as often as compiled programs touch one. That number is
counted, not derived: docs/plan.md has the formula beside the compiler.

Shapes: T tokens of a device in a micro-batch, D model, R rows of a dispatch buffer, F expert
hidden, V vocabulary, S sequence.
"""

from moe_jax.models import MODELS
from moe_jax.models.attention_core import OF_JAX
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.plan import flops, theory
from moe_jax.plan.abstract import shard_bytes
from moe_jax.schema.config import Config
from moe_jax.train_step import State

# How often a pass over a block reads or writes an array, in the mean.
TOUCHED = 12
# The same of attention's scores, where they are arrays of float32 and not the inside of a kernel.
SCORES_TOUCHED = 5


def memory_traffic(cfg: Config, state: State, rows_held: int) -> int:
    """Returns the bytes that a device reads and writes in a step.

    It is 0 for a kind of model that counts its parameters itself: it has other matrices than a
    decoder.

    Args:
      rows_held: of the dispatch buffer, R.
    """
    if MODELS[cfg.model.kind].parameters:
        return 0
    again = 0 if cfg.model.remat == "none" else 1
    # A backward pass has two products for each one of a forward pass.
    passes = theory.forward_passes(cfg) + 2
    in_blocks = (passes + again) * (_rows(cfg, rows_held) + _weights(cfg))
    # Parameters are read, and gradients added up, for each micro-batch.
    of_state = shard_bytes(state) + cfg.train.num_micro_batches * shard_bytes(state.params)
    arrays = in_blocks + passes * _ends(cfg) + of_state
    return TOUCHED * arrays + SCORES_TOUCHED * (passes + again) * _scores(cfg)


def _rows(cfg: Config, rows_held: int) -> int:
    """Returns the bytes of one array [T, D] and one [T, heads] of each block, and of one [R, D] and
    one [R, F] of each MoE layer.
    """
    model, n = cfg.model, cfg.mesh.model
    of_block = theory.buffer_tokens(cfg) * (model.d_model + model.num_heads * model.head_dim // n)
    numbers = theory.runs(cfg, len) * of_block
    if model.num_moe_layers:
        of_layer = rows_held * (model.expert_dim + model.moe.expert_hidden // n)
        numbers += theory.runs(cfg, theory.num_moe) * of_layer
    return numbers * theory.number_bytes(cfg)


def _weights(cfg: Config) -> int:
    """Returns the bytes of the weights that a device multiplies by in the blocks of all
    micro-batches.
    """
    numbers, _ = theory.dense_counts(cfg)
    if cfg.model.num_moe_layers:
        numbers += theory.runs(cfg, theory.num_moe) * theory.local_experts(cfg)
    return numbers * theory.number_bytes(cfg)


def _ends(cfg: Config) -> int:
    """Returns the bytes of embedding and head, and of the logits in float32."""
    _, numbers = theory.dense_counts(cfg)
    num_tokens = cfg.train.num_micro_batches * theory.buffer_tokens(cfg) // cfg.mesh.stage
    logits = num_tokens * cfg.model.vocab_size // cfg.mesh.model
    return numbers * theory.number_bytes(cfg) + 4 * logits


def _scores(cfg: Config) -> int:
    """Returns the bytes of the scores of all blocks and micro-batches; 0 with a kernel that keeps
    them to itself.
    """
    model = cfg.model
    if model.attention_kernel in OF_JAX:
        return 0
    # Each score is one product of a query and a key, and one factor of a value.
    flops_of_one = 2 * sum(ATTENTIONS[model.attention].widths(model))
    of_token = flops.forward_per_token(model, cfg.data.seq_len).attention_scores / flops_of_one
    # Of all blocks; a stage of a pipeline runs some of them.
    num_runs = theory.runs(cfg, len) / len(model.blocks)
    return int(4 * num_runs * theory.buffer_tokens(cfg) * of_token) // cfg.mesh.model
