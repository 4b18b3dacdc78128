"""What a number of a config may be on its own, whatever the other keys are: a misplaced sign or
point trains something else, silently.

BOUNDS has the blocks of configs/base.py, and in each every key that is a number: a test fails for
one without bounds. Rules that tie keys to each other are in rules.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from moe_jax.schema.config import Config


class Bound(NamedTuple):
    """Whole or real numbers that a key may have.

    `words` end the sentence "KEY = VALUE must be ...".
    """

    words: str
    holds: Callable[[Any], bool]
    whole: bool


def whole(words: str, holds: Callable[[Any], bool]) -> Bound:
    return Bound(words, holds, True)


def real(words: str, holds: Callable[[Any], bool]) -> Bound:
    return Bound(words, holds, False)


def at_least(least: int) -> Bound:
    return whole(f"at least {least}", lambda v: v >= least)


COUNT, NUMBER = (
    at_least(0),
    at_least(1),
)  # of things that may be none, and of things that there must be
STEPS = whole("at least 1 and below 2**31", lambda v: 1 <= v < 2**31)  # counted in an int32
SEED = whole("at least 0 and below 2**32", lambda v: 0 <= v < 2**32)
NO_LABEL_OR_MORE = whole("0 or at least 2", lambda v: v == 0 or v >= 2)
NOT_NEGATIVE = real("at least 0", lambda v: v >= 0)
POSITIVE = real("above 0", lambda v: v > 0)
FROM_ONE = real("at least 1", lambda v: v >= 1)
NONE_OR_FROM_ONE = real("0 or at least 1", lambda v: v == 0 or v >= 1)
FRACTION = real("at least 0 and at most 1", lambda v: 0 <= v <= 1)
PART = real("above 0 and at most 1", lambda v: 0 < v <= 1)
BELOW_ONE = real("at least 0 and below 1", lambda v: 0 <= v < 1)
NOT_TINY = real("at least 1e-06", lambda v: v >= 1e-6)
IN_FLOAT32 = real("at least 1e-20", lambda v: v >= 1e-20)

_ROUTERS, _SPARSE = "model.moe.routers", "model.moe.sparse"
BOUNDS: dict[str, dict[str, Bound]] = {
    "": {"seed": SEED, "simulate_devices": COUNT},
    "mesh": {"data": NUMBER, "expert": NUMBER, "model": NUMBER},
    "tasks.translation": {"vocab_size": NUMBER},
    "tasks.translation_prefix": {"vocab_size": NUMBER},
    "tasks.vision": {"patch": NUMBER, "copies": NUMBER, "shift": COUNT},
    "tasks.recommendation": {"min_items": at_least(2), "min_users": NUMBER},
    "tasks.speech": {
        "mel_bins": NUMBER,
        "stack": NUMBER,
        "copies": NUMBER,
        "tempo": BELOW_ONE,
        "noise": NOT_NEGATIVE,
    },
    "model": {
        "vocab_size": NUMBER,
        "d_model": NUMBER,
        "num_heads": NUMBER,
        "num_kv_heads": NUMBER,
        "head_dim": NUMBER,
        "rope_theta": POSITIVE,
        "norm_epsilon": POSITIVE,
        "ffn_hidden": NUMBER,
        "dropout": BELOW_ONE,
        "repeats": COUNT,
    },
    "model.depth": {"capacity": PART, "loss": NOT_NEGATIVE},
    "model.kinds.encoder": {
        "input_dim": NUMBER,
        "num_classes": at_least(2),
        "learned_positions": COUNT,
        "head_dropout": BELOW_ONE,
        "token_dropout": BELOW_ONE,
    },
    "model.kinds.encdec": {"encoder_repeats": COUNT},
    "model.kinds.mmoe": {"items": NUMBER, "item_dropout": BELOW_ONE},
    "model.kinds.article": {
        "num_experts": NUMBER,
        "window": NUMBER,
        "num_classes": NO_LABEL_OR_MORE,
    },
    "model.moe": {
        "num_experts": NUMBER,
        "expert_hidden": NUMBER,
        "shared_experts": COUNT,
        "group_rows": NUMBER,
    },
    "model.moe.orderings.rounding": {"tile": NUMBER},
    "model.moe.dispatchers.dropless": {"buffer": NONE_OR_FROM_ONE},
    "model.moe.dispatchers.capacity": {"factor": POSITIVE},
    "model.moe.losses": {
        "balance": NOT_NEGATIVE,
        "gshard": NOT_NEGATIVE,
        "sequence_balance": NOT_NEGATIVE,
        "micro_batch_balance": NOT_NEGATIVE,
        "importance": NOT_NEGATIVE,
        "load": NOT_NEGATIVE,
        "z": NOT_NEGATIVE,
    },
    "model.moe.adaptive": {"rate": NOT_NEGATIVE, "target_drop": FRACTION, "limit": FROM_ONE},
    f"{_SPARSE}.rules.static": {"threshold": NOT_NEGATIVE},
    f"{_SPARSE}.rules.threshold": {"threshold": NOT_NEGATIVE},
    f"{_SPARSE}.rules.magnitude": {"begin": FRACTION, "end": FRACTION, "every": NUMBER},
    f"{_SPARSE}.rules.set": {"fraction": FRACTION, "every": NUMBER, "end": FRACTION},
    f"{_SPARSE}.rules.rigl": {"fraction": FRACTION, "every": NUMBER, "end": FRACTION},
    f"{_SPARSE}.rules.group_lasso": {"strength": NOT_NEGATIVE},
    f"{_SPARSE}.patterns.unstructured": {"density": PART},
    f"{_SPARSE}.patterns.n_m": {"n": NUMBER, "m": NUMBER},
    f"{_SPARSE}.patterns.blocks": {"density": PART, "block": NUMBER},
    f"{_SPARSE}.patterns.units": {"density": PART},
    f"{_SPARSE}.stored": {"block": COUNT, "w_in": COUNT, "w_out": COUNT},
    f"{_ROUTERS}.top_k": {"k": NUMBER, "scale": POSITIVE},
    f"{_ROUTERS}.switch": {"jitter": BELOW_ONE},
    f"{_ROUTERS}.noisy_top_k": {"k": NUMBER, "min_noise": NOT_TINY},
    f"{_ROUTERS}.sigmoid": {
        "k": NUMBER,
        "scale": POSITIVE,
        "bias_rate": NOT_NEGATIVE,
        "num_groups": NUMBER,
        "top_groups": NUMBER,
    },
    f"{_ROUTERS}.quantile": {"k": NUMBER, "scale": POSITIVE, "bins": at_least(2), "ema": BELOW_ONE},
    f"{_ROUTERS}.cosine": {
        "k": NUMBER,
        "dim": COUNT,
        "temperature": NOT_TINY,
        "min_temperature": NOT_TINY,
    },
    f"{_ROUTERS}.multi_gate": {"k": NUMBER, "num_gates": NUMBER},
    f"{_ROUTERS}.null": {"k": NUMBER, "num_null": NUMBER},
    f"{_ROUTERS}.uniform": {"k": NUMBER},
    f"{_ROUTERS}.random": {"k": NUMBER, "seed": SEED},
    f"{_ROUTERS}.hash": {"k": NUMBER, "seed": SEED},
    f"{_ROUTERS}.base": {"k": NUMBER, "iterations": NUMBER},
    f"{_ROUTERS}.relu": {"k": NUMBER, "max_active": NUMBER, "l1": IN_FLOAT32, "alpha": FROM_ONE},
    f"{_ROUTERS}.expert_choice": {"factor": POSITIVE},
    f"{_ROUTERS}.soft": {"slots": NUMBER},
    f"{_ROUTERS}.recorded": {"k": NUMBER, "average": NOT_NEGATIVE},
    "optim": {
        "learning_rate": NOT_NEGATIVE,
        "warmup_steps": COUNT,
        "clip_norm": NOT_NEGATIVE,
        "ema_decay": BELOW_ONE,
    },
    "optim.optimizers.adamw": {
        "b1": BELOW_ONE,
        "b2": BELOW_ONE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    },
    "optim.optimizers.lion": {"b1": BELOW_ONE, "b2": BELOW_ONE, "weight_decay": NOT_NEGATIVE},
    "optim.optimizers.adafactor": {"decay_rate": PART, "weight_decay": NOT_NEGATIVE},
    "optim.optimizers.muon": {
        "beta": BELOW_ONE,
        "ns_steps": NUMBER,
        "weight_decay": NOT_NEGATIVE,
        "adam_learning_rate": NOT_NEGATIVE,
    },
    "optim.optimizers.sgd": {"momentum": BELOW_ONE, "weight_decay": NOT_NEGATIVE},
    "optim.schedules.cosine": {"final_fraction": FRACTION},
    "optim.schedules.wsd": {"decay_fraction": FRACTION, "final_fraction": FRACTION},
    "optim.schedules.linear": {"final_fraction": FRACTION},
    "train": {
        "steps": STEPS,
        "batch_size": NUMBER,
        "micro_batch_size": NUMBER,
        "nonfinite_patience": COUNT,
        "stop_at": COUNT,
    },
    "data": {
        "seq_len": NUMBER,
        "slice_bytes": COUNT,
        "heldout_bytes": COUNT,
        "heldout_every": at_least(2),
        "prefetch": NUMBER,
    },
    "eval": {
        "every": COUNT,
        "batches": COUNT,
        "final_batches": COUNT,
        "batch_size": NUMBER,
        "sample_tokens": COUNT,
    },
    "checkpoint": {"every": COUNT, "keep": NUMBER, "keep_best": COUNT},
    "log": {"every": NUMBER, "histogram_every": NUMBER, "interference_every": COUNT},
    "record": {"rows": COUNT},
}
# Blocks of which one is chosen: where a Config has its name, and where its options.
CHOSEN = {
    "tasks": ("task", "task_options"),
    "model.kinds": ("model.kind", "model.kind_options"),
    "model.moe.routers": ("model.moe.router", "model.moe.router_options"),
    "model.moe.orderings": ("model.moe.ordering", "model.moe.ordering_options"),
    "model.moe.dispatchers": ("model.moe.dispatcher", "model.moe.dispatcher_options"),
    "model.moe.sparse.rules": ("model.moe.sparse.rule", "model.moe.sparse.rule_options"),
    "model.moe.sparse.patterns": ("model.moe.sparse.pattern", "model.moe.sparse.pattern_options"),
    "optim.optimizers": ("optim.optimizer", "optim.options"),
    "optim.schedules": ("optim.schedule", "optim.schedule_options"),
}


def refusals(c: Config) -> Iterator[str]:
    """A message for each number that is out of its bounds."""
    for block, bounds in BOUNDS.items():
        values = _values(c, block)
        for key, bound in bounds.items():
            if values is not None:
                yield from _refuse(f"{block}.{key}" if block else key, _at(values, key), bound)
    if c.task == "lm":
        yield from _sources(c.data.sources)


def _values(c: Config, block: str) -> Any:
    """What holds the keys of a block; None for one that is not chosen."""
    choices, _, name = block.rpartition(".")
    if choices not in CHOSEN:
        return _at(c, block)
    choice, options = CHOSEN[choices]
    return _at(c, options) if _at(c, choice) == name else None


def _refuse(path: str, value: Any, bound: Bound) -> Iterator[str]:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int if bound.whole else int | float):
            yield f"{path} = {value} must be a {'whole number' if bound.whole else 'number'}, {bound.words}"
        elif not math.isfinite(number):
            yield f"{path} = {value} must be finite and {bound.words}"
        elif not bound.holds(number):
            yield f"{path} = {value} must be {bound.words}"


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
    for part in path.split(".") if path else ():
        c = c[part] if isinstance(c, Mapping) else getattr(c, part)
    return c
