"""The frozen config: every key that belongs to no component, with default, comment and bounds.

Below train.py no ConfigDict travels. The tree that users change is assembled from these dataclasses
and from the Options of the components (config/tree.py); config/build.py makes a Config of it.
"""

import dataclasses
import itertools
from typing import Any

from moe_jax.parallel.mesh import AXES, Lengths
from moe_jax.runtime.faults import Fault, parse
from moe_jax.schema.beside import (
    CheckpointConfig,
    EvalConfig,
    LimitsConfig,
    LogConfig,
    RecordConfig,
)
from moe_jax.schema.blocks import KindOptions, Stack, attention_of, inner, is_depth
from moe_jax.schema.options import (
    AXIS,
    BELOW_ONE,
    COUNT,
    FRACTION,
    FROM_ONE,
    NOT_NEGATIVE,
    NUMBER,
    PART,
    POSITIVE,
    SEED,
    choice,
    derived,
    option,
)
from moe_jax.schema.steps import profile_range
from moe_jax.schema.training import DataConfig, OptimConfig, TrainConfig

# The choice of model.moe.sparse.rule that makes no zeros.
NO_RULE = "none"
# What model.remat may name (models/stack.py), and every choice of several.
# What the factors of a feed-forward's products may be rounded to (moe/experts/narrow.py).
FFN_NUMBERS = ("full", "int8", "float8")
REMAT_NAMES = ("attention", "dispatch", "experts")
NAMED_REMAT = tuple(
    "+".join(some) for n in (1, 2, 3) for some in itertools.combinations(REMAT_NAMES, n)
)


class Coefficients(dict[str, float]):
    """The coefficients of the auxiliary losses: a dict that nobody changes, so that jax may hash
    it.
    """

    # A dict has no hash, and a frozen config with one could be no static argument.
    def __hash__(self) -> int:
        return hash(tuple(sorted(self.items())))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    stage: int = option(1, "pipeline parallel: layers", AXIS)
    data: int = option(
        -1, "data parallel and FSDP; -1 = the devices that the other axes leave", AXIS
    )
    expert: int = option(1, "expert parallel (also shards the batch)", AXIS)
    seq: int = option(1, "context parallel: tokens of a row", AXIS)
    model: int = option(1, "tensor parallel: heads, hidden columns, vocabulary", AXIS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """The weight of the balance losses, driven by what drops (moe/losses)."""

    rate: float = option(
        0.0,
        "> 0: the weight of the balance losses grows by this factor a step while more drops than "
        "target_drop; 0 = off",
        NOT_NEGATIVE,
    )
    target_drop: float = option(0.01, "fraction of assignments", FRACTION)
    limit: float = option(100.0, "the weight stays within [1 / limit, limit]", FROM_ONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredConfig:
    """How `convert compact` stored the experts of a model for inference: never written by hand."""

    block: int = option(0, "side of a block; 0 = whole matrices", COUNT)
    w_in: int = option(0, "blocks of a column", COUNT)
    w_out: int = option(0, "blocks of a column", COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Zeros inside the experts' weights (docs/sparse_weights.md)."""

    rule: str = choice(
        NO_RULE, "rules", 'who decides which weights are zero; "none" = experts are dense'
    )
    rule_options: Any = derived()
    pattern: str = choice("unstructured", "patterns", "what is zero together")
    pattern_options: Any = derived()
    stored: StoredConfig

    @property
    def dense(self) -> bool:
        """True where no rule makes zeros."""
        return self.rule == NO_RULE


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    num_experts: int = option(8, "routed experts of a layer", NUMBER)
    expert_hidden: int = option(256, "hidden width of one expert", NUMBER)
    latent_dim: int = option(
        0,
        "width that the routed experts work in, below d_model, so that less travels (LatentMoE, "
        "arXiv:2601.18089); 0 = d_model",
        COUNT,
    )
    shared_experts: int = option(0, "always-on experts, added to the routed ones", COUNT)
    shared_hidden: int = option(0, "hidden width of a shared expert; 0 = expert_hidden", COUNT)
    shared_gate: bool = option(
        False, "shared experts times sigmoid(x w) (Qwen1.5-MoE, Qwen2, arXiv:2407.10671)"
    )
    expert_bias: bool = option(
        False, "routed experts have biases after both matrices (gpt-oss, arXiv:2508.10925)"
    )
    group_rows: int = option(1, "rows (sequences) that share expert capacity and ordering", NUMBER)
    router: str = choice("top_k", "routers", "which experts take which token")
    router_options: Any = derived()
    ordering: str = choice(
        "token_major", "orderings", "which assignment wins when an expert is full"
    )
    ordering_options: Any = derived()
    dispatcher: str = choice("dropless", "dispatchers", "how tokens reach their experts")
    dispatcher_options: Any = derived()
    overlap_chunks: int = option(
        1,
        "> 1: the tokens of a device in so many parts, so that one can travel while the experts of "
        "another compute (docs/exchange.md)",
        NUMBER,
    )
    expert_kernel: str = option(
        "auto",
        'what computes the experts: "auto" = by the platform compiled for (docs/accelerators.md), '
        '"blocks", "tiles", "pallas_tpu", "pallas_hopper" or "ragged_dot"',
        choices=("auto", "blocks", "tiles", "pallas_tpu", "pallas_hopper", "ragged_dot"),
    )
    # Coefficients by name: moe/losses.
    losses: Coefficients = derived()
    adaptive: AdaptiveConfig
    sparse: SparseConfig

    @property
    def shared_width(self) -> int:
        """The hidden width of all shared experts together: n of width F are one of width n F."""
        return self.shared_experts * (self.shared_hidden or self.expert_hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig:
    capacity: float = option(
        0.125, "fraction of a sequence's tokens that train a depth block (models/depth.py)", PART
    )
    loss: float = option(
        0.1,
        "coefficient of the loss that trains the causal rule, by which they evaluate and decode",
        NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    kind: str = choice("decoder", "kinds", "which model: moe_jax/models")
    kind_options: KindOptions = derived()
    vocab_size: int = option(256, "rows of the embedding; at least the tokenizer's", NUMBER)
    d_model: int = option(128, "width of the residual stream", NUMBER)
    attention: str = choice(
        "grouped_query", "attentions", "which tokens a token sees, and by which projections"
    )
    attention_options: Any = derived()
    # (name, options) of each attention that a block names.
    block_attentions: tuple[tuple[str, Any], ...] = derived()
    attention_kernel: str = option(
        "auto",
        'what computes attention: "auto" = by the platform compiled for and the length of a row '
        '(docs/accelerators.md), "blocks" or "chunks"; or one of JAX: "splash" for TPUs, "triton" '
        "for GPUs",
        choices=("auto", "blocks", "chunks", "splash", "triton"),
    )
    num_heads: int = option(4, "query heads", NUMBER)
    num_kv_heads: int = option(4, "fewer than num_heads = grouped-query attention", NUMBER)
    head_dim: int = option(0, "0 = d_model / num_heads", NUMBER)
    qk_norm: bool = option(
        False, "RMSNorm of queries and keys (Henry et al. 2020, arXiv:2010.04245)"
    )
    qk_norm_over: str = option(
        "head",
        'what qk_norm normalises together: "head", each head by itself, or "width", all heads of a '
        "token (OLMo 2, arXiv:2501.00656)",
        choices=("head", "width"),
    )
    attention_scale: float = option(
        0.0, "factor on the scores; 0 = the width of a head ** -0.5", NOT_NEGATIVE
    )
    attention_cap: float = option(
        0.0,
        "> 0: a score s is cap * tanh(s / cap) (Gemma 2, arXiv:2408.00118, section 2); 0 = off",
        NOT_NEGATIVE,
    )
    attention_sinks: bool = option(
        False,
        "each query head has a learned score that it gives to nothing (gpt-oss, arXiv:2508.10925)",
    )
    attention_bias: bool = option(False, "biases of the query, key and value projections")
    output_bias: bool = option(False, "a bias of the output projection of attention")
    rope_theta: float = option(
        10_000.0, "base of the rotary frequencies (Su et al. 2021, arXiv:2104.09864)", POSITIVE
    )
    rope_fraction: float = option(
        1.0, "part of a head that is turned, from its begin (GPT-NeoX, arXiv:2204.06745)", PART
    )
    rope_pairs: str = option(
        "halves",
        'which numbers of a head turn together: "halves", i and i + width / 2, or "neighbours", '
        "2 i and 2 i + 1",
        choices=("halves", "neighbours"),
    )
    rope_scaling: str = choice(
        "none", "rope_scalings", "of the rotary frequencies, for rows longer than before"
    )
    rope_scaling_options: Any = derived()
    norm_epsilon: float = option(1e-6, "of RMSNorm, inside its root", POSITIVE)
    norm_position: str = option(
        "before",
        'norms of a block: "before" attention and feed-forward, "after" them, still inside of '
        'the residual branch (OLMo 2, arXiv:2501.00656), or "both" (Gemma 2, arXiv:2408.00118)',
        choices=("before", "after", "both"),
    )
    norm_plus_one: bool = option(
        False, "norms multiply by 1 + their scale, which begins at 0 (Gemma, arXiv:2403.08295)"
    )
    ffn_hidden: int = option(512, "hidden width of a dense block", NUMBER)
    ffn_numbers: str = option(
        "full",
        "what both factors of the forward products of feed-forwards, dense and expert, are rounded "
        'to: "full" = model.dtype, "int8" or "float8" (docs/precision.md)',
        choices=FFN_NUMBERS,
    )
    activation: str = choice("swiglu", "activations", "of feed-forwards, dense and expert")
    activation_options: Any = derived()
    tie_embeddings: bool = option(False, "the head is the embedding's transpose")
    embedding_scale: float = option(
        0.0,
        "factor on the embeddings of tokens; 0 = sqrt(d_model) (Vaswani et al. 2017, "
        "arXiv:1706.03762, section 3.4)",
        NOT_NEGATIVE,
    )
    head_scale: float = option(
        1.0,
        "factor on what the head reads (T5, arXiv:1910.10683, has d_model ** -0.5 where the head "
        "is tied)",
        POSITIVE,
    )
    dropout: float = option(0.0, "of the embedding and of each residual branch", BELOW_ONE)
    prefix: tuple[str, ...] = option(
        (),
        'blocks before the period: a tuple of "dense", "moe", and "depth:dense", "depth:moe" '
        '(mixture of depths); "sliding_window:moe" has that attention',
    )
    period: tuple[str, ...] = option(("moe",), "blocks repeated `repeats` times")
    repeats: int = option(4, "of the period", COUNT)
    suffix: tuple[str, ...] = option((), "blocks after the last period")
    scan: bool = option(False, "the repeats as one lax.scan over stacked parameters")
    remat: str = option(
        "none",
        'what the backward pass recomputes of a block: "none", "full" = everything, "dots" = all '
        'but products of weights, or all but what "attention", "dispatch" or "experts" name; or '
        'several of these: "attention+experts"',
        choices=("none", "full", "dots", *NAMED_REMAT),
    )
    remat_offload: bool = option(
        False, "what model.remat names is kept in the host's memory until it is needed"
    )
    logit_cap: float = option(
        0.0,
        "> 0: a logit z of the head is cap * tanh(z / cap) (Gemma 2, arXiv:2408.00118, section 2); "
        "0 = off",
        NOT_NEGATIVE,
    )
    loss_chunk: int = option(
        0,
        "tokens of a device whose logits exist at a time; 0 = all where these are few, else as "
        "many as make 16 million logits (docs/accelerators.md)",
        COUNT,
    )
    logit_z_loss: float = option(
        0.0,
        "coefficient of the mean of log(Z)^2, Z the denominator of the softmax over the vocabulary "
        "(PaLM, arXiv:2204.02311, section 5); 0 = off",
        NOT_NEGATIVE,
    )
    allow_leak: bool = option(
        False,
        "True: train a causal model although later tokens or other sequences change its outputs "
        "(config/causality.py)",
    )
    param_dtype: str = option(
        "float32",
        "of the parameters; moments and averages have at least float32 (docs/precision.md)",
        choices=("float32", "bfloat16", "float64"),
    )
    dtype: str = option(
        "float32",
        "of the computation; the router uses at least float32",
        choices=("float32", "bfloat16", "float64"),
    )
    depth: DepthConfig
    moe: MoEConfig

    @property
    def stacks(self) -> dict[str, Stack]:
        """The stacks of blocks in the order in which they run, by the key below which the arrays
        of each lie in the model's parameters; "" is the root.
        """
        return self.kind_options.stacks(Stack(self.prefix, self.period, self.repeats, self.suffix))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The kind of every block, in order: one of BLOCKS, with an attention before it or not.

        Those of an encoder-decoder begin with its encoder's.
        """
        return tuple(kind for stack in self.stacks.values() for kind in stack.blocks)

    @property
    def num_moe_layers(self) -> int:
        return sum(inner(kind) == "moe" for kind in self.blocks)

    @property
    def num_dense_layers(self) -> int:
        return len(self.blocks) - self.num_moe_layers

    @property
    def num_depth_blocks(self) -> int:
        return sum(is_depth(kind) for kind in self.blocks)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention of every block, in order."""
        return tuple(attention_of(kind) or self.attention for kind in self.blocks)

    @property
    def expert_dim(self) -> int:
        """The width that the routed experts read and write."""
        return self.moe.latent_dim or self.d_model

    def of_block(self, kind: str) -> "ModelConfig":
        """Returns the config of a block of this kind: `attention` is that of the block."""
        return self.with_attention(attention_of(kind) or self.attention)

    def with_attention(self, name: str) -> "ModelConfig":
        """Returns the config with another attention of its blocks in the place of `attention`."""
        if name == self.attention:
            return self
        options = dict(self.block_attentions)[name]
        return dataclasses.replace(self, attention=name, attention_options=options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = option(0, "parameters, data order, dropout", SEED)
    simulate_devices: int = option(
        0, "CPU devices to simulate in this process; 0 = the devices that are there", COUNT
    )
    smoke: bool = option(
        False, "a few steps of everything, to see that it works: what --smoke sets"
    )
    profile: tuple[int, int] | None = option(
        "", '"10:13" writes a profiler trace of steps 10, 11 and 12', parse=profile_range
    )
    compile_cache: str = option(
        "auto",
        'where compiled programs are kept: "auto" = the user\'s cache directory, "" = nowhere',
    )
    chip_flags: bool = option(
        True, "compile with the flags of XLA for this kind of chip (moe_jax/parallel/chip_flags.py)"
    )
    faults: tuple[Fault, ...] = option(
        "", 'faults that happen on purpose: "kill@12:1" (moe_jax/runtime/faults.py)', parse=parse
    )
    # Of MeshConfig's keys, -1 filled in, or of mesh_fallbacks: config/build.py.
    mesh: Lengths = derived(MeshConfig)
    mesh_fallbacks: tuple[str, ...] = option(
        (),
        'DATAxEXPERTxMODEL for another number of devices, as after a restart: ("2x2x1", "2x1x1")',
    )
    mesh_slow_axis: str = option(
        "data",
        "the axis that crosses the network between several TPU slices",
        choices=AXES,
    )
    task: str = choice("lm", "tasks", "what is learned: moe_jax/tasks")
    task_options: Any = derived()
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    data: DataConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    record: RecordConfig
    limits: LimitsConfig
