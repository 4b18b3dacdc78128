"""The keys of what a run does beside its steps: evaluating, saving, logging and recording, and the
time that all of it may take.
"""

import dataclasses

from moe_jax.schema.options import COUNT, FROM_ONE, NOT_NEGATIVE, NUMBER, option
from moe_jax.schema.steps import Due, due


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = option(100, "steps between evaluations; 0 = only at the end", COUNT)
    batches: int = option(
        0, "held-out batches of each evaluation on the way; 0 = all of them", COUNT
    )
    final_batches: int = option(
        0, "held-out batches of the evaluation at the end; 0 = all of them", COUNT
    )
    batch_size: int = option(0, "rows of an evaluation batch; 0 = train.batch_size", NUMBER)
    dispatcher: str = option(
        "same", '"same" as in training, or the name of another dispatcher ("dropless")'
    )
    sample_tokens: int = option(
        200, "tokens of the sample printed at each evaluation; 0 = none", COUNT
    )
    sample_prompt: str = option("", "what the sample begins with")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = option(500, "steps between checkpoints; 0 = only at the end", COUNT)
    keep: int = option(2, "the last n are kept", NUMBER)
    keep_best: int = option(1, "and the best n by held-out loss", COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = option(
        10,
        "steps between rows of metrics.jsonl; such a step holds a second copy of the parameters, "
        "for the update norm",
        NUMBER,
    )
    tensorboard: bool = option(True, "also write TensorBoard events")
    trackers: tuple[str, ...] = option(
        (), 'services that get the figures too: ("wandb",), ("mlflow",); moe_jax/report/trackers'
    )
    project: str = option("moe_jax", "the project or experiment of the run there")
    histogram_every: int = option(
        100,
        "steps between rows of the picture of the experts' load (TensorBoard, 4_experts)",
        NUMBER,
    )
    interference_every: int = option(
        0,
        "steps between gradients of language and auxiliary losses compared (3 backward passes); 0 "
        "= off",
        COUNT,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordConfig:
    steps: Due = option(
        "",
        'steps whose routing is written, token by token, to workdir/routing: "100,200", "every 50"',
        parse=due,
    )
    rows: int = option(0, "the first n rows of the batch; 0 = all", COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    join: int = option(300, "seconds to wait for the other processes of the run to start", NUMBER)
    heartbeat: float = option(
        60.0,
        "seconds after which a process that is not heard from counts as dead, and all others end",
        FROM_ONE,
    )
    step: float = option(
        600.0,
        "seconds without a step after which a process counts as stuck and ends; 0 = never",
        NOT_NEGATIVE,
    )
    other: float = option(
        7200.0,
        "the same inside a compilation, an evaluation or a save; 0 = never",
        NOT_NEGATIVE,
    )
    grace: float = option(
        90.0,
        "seconds after SIGTERM or Ctrl-C after which a process that hangs ends unsaved; 0 = never",
        NOT_NEGATIVE,
    )
