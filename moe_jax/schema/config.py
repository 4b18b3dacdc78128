"""The frozen config: below train.py no ConfigDict travels. config/build.py makes it from the tree
that users change.
"""

import dataclasses
from typing import Any, NamedTuple

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import Lengths

# what the kind of a block begins with that only some tokens go through, as in "depth:moe"
DEPTH = "depth:"


class Options(dict[str, Any]):
    """The options of a chosen router, dispatcher, optimizer or schedule: a dict that nobody
    changes, so that jax may hash it.
    """

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.items())))


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """Zeros inside the experts' weights: moe_jax/moe/sparse."""

    rule: str
    rule_options: Options
    pattern: str
    pattern_options: Options
    stored: Options


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    num_experts: int
    expert_hidden: int
    shared_experts: int
    group_rows: int
    router: str
    router_options: Options
    ordering: str
    ordering_options: Options
    dispatcher: str
    dispatcher_options: Options
    losses: Options
    adaptive: Options
    sparse: SparseConfig


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    capacity: float
    loss: float


class Stack(NamedTuple):
    """The kinds of blocks that run one after another: prefix, `repeats` times period, suffix."""

    prefix: tuple[str, ...]
    period: tuple[str, ...]
    repeats: int
    suffix: tuple[str, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The kind of every block, in order."""
        return self.prefix + self.period * self.repeats + self.suffix


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    kind: str
    kind_options: Options
    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    attention_bias: bool
    rope_theta: float
    norm_epsilon: float
    ffn_hidden: int
    activation: str
    tie_embeddings: bool
    dropout: float
    prefix: tuple[str, ...]
    period: tuple[str, ...]
    repeats: int
    suffix: tuple[str, ...]
    scan: bool
    remat: str
    allow_leak: bool
    param_dtype: str
    dtype: str
    depth: DepthConfig
    moe: MoEConfig

    @property
    def stacks(self) -> dict[str, Stack]:
        """The stacks of blocks in the order in which they run, by the key below which the arrays
        of each lie in the model's parameters; "" is the root.
        """
        if self.kind == "article":
            return {}
        own = {"": Stack(self.prefix, self.period, self.repeats, self.suffix)}
        if self.kind != "encdec":
            return own
        options = {name: self.kind_options[f"encoder_{name}"] for name in Stack._fields}
        return {"encoder": Stack(**options)} | own

    @property
    def blocks(self) -> tuple[str, ...]:
        """The kind of every block, in order:

        "dense" or "moe", or one of them inside a mixture of depths: "depth:dense", "depth:moe".

        Those of an encoder-decoder begin with its encoder's.
        """
        return tuple(kind for stack in self.stacks.values() for kind in stack.blocks)

    @property
    def num_moe_layers(self) -> int:
        return self.blocks.count("moe") + self.blocks.count(DEPTH + "moe")

    @property
    def num_dense_layers(self) -> int:
        return len(self.blocks) - self.num_moe_layers

    @property
    def attends(self) -> bool:
        """Whether the model has attention at all."""
        return self.kind not in ("mmoe", "article")

    @property
    def embeds(self) -> bool:
        """Whether the model looks up rows of a vocabulary: an encoder of vectors projects them
        instead.
        """
        return self.kind_options.get("inputs", "tokens") == "tokens"

    @property
    def num_depth_blocks(self) -> int:
        return sum(kind.startswith(DEPTH) for kind in self.blocks)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    optimizer: str
    options: Options
    learning_rate: float
    schedule: str
    schedule_options: Options
    warmup_steps: int
    steps: int
    clip_norm: float
    decay_mask: str
    train_only: str
    master_copy: bool
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch_size: int
    micro_batch_size: int
    nonfinite_patience: int
    init_from: str
    init_rename: tuple[tuple[str, str], ...]
    stop_at: int

    @property
    def num_micro_batches(self) -> int:
        return self.batch_size // self.micro_batch_size


@dataclasses.dataclass(frozen=True)
class DataConfig:
    sources: tuple[tuple[str, float], ...]
    seq_len: int
    slice_bytes: int
    heldout_bytes: int
    heldout_every: int
    folder: str
    prefetch: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int
    batches: int
    final_batches: int
    batch_size: int
    dispatcher: str
    sample_tokens: int
    sample_prompt: str


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep: int
    keep_best: int


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int
    tensorboard: bool
    histogram_every: int
    interference_every: int


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    steps: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    simulate_devices: int
    smoke: bool
    profile: tuple[int, int] | None
    mesh: Lengths
    task: str
    task_options: Options
    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    data: DataConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    record: RecordConfig


class Due(NamedTuple):
    """The steps that are recorded: those named, and each multiple of a number."""

    steps: frozenset[int]
    every: tuple[int, ...]

    def __call__(self, step: int) -> bool:
        return step in self.steps or any(step % n == 0 for n in self.every)

    @property
    def first(self) -> int | None:
        return min({*self.steps, *self.every}, default=None)


def due(text: str) -> Due:
    """What `record.steps` says of a step:

    "100,200", "every 50", both ("1,every 50"), or "" for none. UserError.
    """
    steps, every = set(), []
    for part in filter(None, (p.strip() for p in text.split(","))):
        number = part.removeprefix("every ").strip()
        if not number.isdecimal() or int(number) < 1:
            raise UserError(
                f'record.steps = "{text}": {part!r} is neither a step nor "every N": write 100,200 '
                "or every 50"
            )
        (every.append if part.startswith("every ") else steps.add)(int(number))
    return Due(frozenset(steps), tuple(every))
