"""The keys of how a run trains: its optimizer, its steps and its data."""

import dataclasses
from typing import Any

from moe_jax.schema.options import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    STEPS,
    at_least,
    choice,
    derived,
    option,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float = option(3e-3, "peak", NOT_NEGATIVE)
    warmup_steps: int = option(
        20, "linear, from 0; fewer in a run that is too short for them, which says so", COUNT
    )
    clip_norm: float = option(1.0, "global gradient norm; 0 = off", NOT_NEGATIVE)
    decay_mask: str = option(
        "matrices",
        'what weight decay applies to: "matrices", "all", "none"',
        choices=("matrices", "all", "none"),
    )
    train_only: str = option(
        "",
        'regular expression: only parameters in whose names it is found move ("^ends/head": '
        'docs/tasks.md); "" = all',
    )
    master_copy: bool = option(
        False,
        "of parameters in bfloat16, one in float32 beside them, which small updates add up in "
        "(docs/precision.md)",
    )
    ema_decay: float = option(
        0.0, "exponential moving average of the parameters, used by evaluation; 0 = off", BELOW_ONE
    )
    optimizer: str = choice("adamw", "optimizers", "what makes an update of a gradient")
    options: Any = derived()
    schedule: str = choice("cosine", "schedules", "of the learning rate, after the warm-up")
    schedule_options: Any = derived()
    # train.steps.
    steps: int = derived()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = option(1000, "optimizer steps of the run", STEPS)
    batch_size: int = option(
        16, "rows (sequences) of an optimizer step, over all devices and micro-batches", NUMBER
    )
    micro_batch_size: int = option(
        0,
        "rows of a micro-batch; smaller than batch_size = exact gradient accumulation; 0 = "
        "batch_size",
        NUMBER,
    )
    pipeline_schedule: str = option(
        "gpipe",
        'order of the works of a pipeline, where mesh.stage > 1: "gpipe", all forward works before '
        'the backward ones, or "1f1b", which keeps fewer micro-batches and computes them once more',
        choices=("gpipe", "1f1b"),
    )
    pipeline_chunks: int = option(
        1,
        "of layers on each stage of a pipeline, through which micro-batches go in turn; more = the "
        "interleaved schedule, with a smaller bubble",
        NUMBER,
    )
    nonfinite_patience: int = option(
        0,
        "steps in a row with a non-finite loss or gradient that are skipped before the run stops",
        COUNT,
    )
    spike_sigma: float = option(
        0.0,
        "a step is not taken whose loss or gradient norm is so many standard deviations above the "
        "mean of the last 128; 0 = off",
        NOT_NEGATIVE,
    )
    init_from: str = option("", "workdir of another run whose parameters this one starts from")
    init_rename: tuple[tuple[str, str], ...] = option(
        (),
        "pairs of a prefix of those parameters' names and a new one, as in "
        '(("repeats/0", "prefix/0"),); ("head", "") leaves head out',
    )
    stop_at: int = option(
        0, "end after this step although train.steps (and the schedule) go further; 0 = off", COUNT
    )

    @property
    def num_micro_batches(self) -> int:
        # `build` has filled in the 0, and the rules have refused a remainder.
        return self.batch_size // self.micro_batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: tuple[tuple[str, float], ...] = option(
        (("embedded", 1.0),),
        '(source, weight): "embedded", "embedded:drama,verse" or a prepared directory',
    )
    seq_len: int = option(256, "tokens of a row", NUMBER)
    slice_bytes: int = option(
        0, "training bytes of each embedded domain, as whole documents; 0 = all", COUNT
    )
    heldout_bytes: int = option(0, "held-out bytes of each embedded domain, likewise", COUNT)
    heldout_every: int = option(20, "every n-th document of a domain is held out", at_least(2))
    folder: str = option(
        "data", "where files of data that the package does not have lie; not for data.sources"
    )
    prefetch: int = option(4, "batches read ahead", NUMBER)
