"""What a number of a config may be on its own, whatever the other keys are: a misplaced sign or point trains something else, silently."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.config import Config

BOUNDS = {
    "at least 0": (
        ("seed", "optim.learning_rate", "optim.warmup_steps", "optim.clip_norm", "model.repeats", "model.depth.loss"),
        ("model.moe.shared_experts", "train.nonfinite_patience", "train.stop_at", "data.slice_bytes"),
        ("data.heldout_bytes", "eval.every", "eval.batches", "eval.final_batches", "eval.sample_tokens"),
        ("checkpoint.every", "checkpoint.keep_best", "log.interference_every", "record.rows"),
    ),
    "at least 1": (
        ("model.vocab_size", "model.d_model", "model.num_heads", "model.num_kv_heads", "model.head_dim"),
        ("model.ffn_hidden", "model.moe.num_experts", "model.moe.expert_hidden", "model.moe.group_rows"),
        ("train.steps", "train.batch_size", "train.micro_batch_size", "eval.batch_size", "data.seq_len"),
        ("data.prefetch", "checkpoint.keep", "log.every", "log.histogram_every"),
    ),
    "at least 2": (("data.heldout_every",),),
    "above 0": (("model.rope_theta", "model.norm_epsilon"),),
    "at least 0 and below 1": (("model.dropout", "optim.ema_decay"),),
}
OF_OPTIMIZERS = {
    "at least 0 and below 1": ("b1", "b2", "beta", "momentum"),
    "at least 0": ("eps", "weight_decay"),
    "at least 1": ("ns_steps",),
}
HOLDS = {
    "at least 0": lambda v: v >= 0,
    "at least 1": lambda v: v >= 1,
    "at least 2": lambda v: v >= 2,
    "above 0": lambda v: v > 0,
    "at least 0 and below 1": lambda v: 0 <= v < 1,
}


def refusals(c: Config) -> Iterator[str]:
    """A message for each number that is out of its bounds."""
    for words, groups in BOUNDS.items():
        for path in (path for group in groups for path in group):
            yield from _refuse(path, _at(c, path), words)
    for words, names in OF_OPTIMIZERS.items():
        for name in (name for name in names if name in c.optim.options):
            yield from _refuse(f"optim.optimizers.{c.optim.optimizer}.{name}", c.optim.options[name], words)
    yield from _sources(c.data.sources)


def _refuse(path: str, value: Any, words: str) -> Iterator[str]:
    if not (HOLDS[words](value) and math.isfinite(value)):
        yield f"{path} = {value} must be {words}"


def _sources(sources: Any) -> Iterator[str]:
    right = 'write pairs of a source and its weight, as in (("embedded", 1.0),) or (("datasets/a", 3.0), ("datasets/b", 1.0))'
    if not sources:
        yield 'data.sources is empty: name at least one, as in (("embedded", 1.0),)'
    for entry in sources:
        pair = isinstance(entry, tuple | list) and len(entry) == 2
        if not (pair and isinstance(entry[0], str) and isinstance(entry[1], float | int)):
            yield f"data.sources = {sources!r} has {entry!r} in it: {right}"
        elif not (math.isfinite(entry[1]) and entry[1] > 0):
            yield f"data.sources: the weight of {entry[0]!r} ({entry[1]}) must be a number above 0"


def _at(c: Any, path: str) -> Any:
    for part in path.split("."):
        c = c[part] if isinstance(c, Mapping) else getattr(c, part)
    return c
