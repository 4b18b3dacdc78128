"""Recommendation by a multi-gate mixture of experts (Ma et al. 2018, KDD,
doi:10.1145/3219819.3220007) over sparse multi-hot features.

    x    = weighted sum of the embeddings of a row's features (an embedding bag: table rows looked
           up, summed by segment; no one-hot)
    h    = gelu(norm(x) W + b), the shared bottom
    h_g  = h of every task g, as token g of a row, through residual MoE layers: the router
           `multi_gate` has a gate for every task, so h_g + sum_e gate_ge f_e(norm(h_g)) are the
           paper's mixtures (eq. 6; k = num_experts makes them dense, as there)
    t_g  = h_g + gelu(norm(h_g) U_g), the tower of the task
    score of item i = norm(t_g) . v_i + b_i, where g is the task that the item belongs to; one
           softmax over the items of all tasks

Any router goes: one that does not read the position gives all tasks one gate (the paper's OMoE).
Dropped input items in training leave other items to be predicted from, as in Mult-VAE (Liang et al.
2018, arXiv:1802.05814, section 2.3).

Shapes: B rows, L features of a row, V features, I items, G tasks, D model.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.models.block import Look
from moe_jax.models.contract import Kind
from moe_jax.models.counting import Decoder, norms_of_part
from moe_jax.models.decoder import as_decoder
from moe_jax.models.ends import embedding, embedding_scale, norm_scale
from moe_jax.models.layers import dropout, gather, norm
from moe_jax.models.stack import run_stack, stack
from moe_jax.moe.layer import Batch
from moe_jax.moe.routing import ROUTERS
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.precision import wide_dtype
from moe_jax.schema.blocks import KindOptions
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import BELOW_ONE, NUMBER, option, typed_options
from moe_jax.weights import Weight, Weights

NAME = "mmoe"


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    items: tuple[int, ...] = option(
        (1,),
        "items of each task: the first so many belong to task 0, the next to task 1, and so on",
        NUMBER,
    )
    item_dropout: float = option(0.0, "of a row's input features, in training", BELOW_ONE)

    @property
    def masks(self) -> tuple[str, ...]:
        """Returns none: the tasks of a row meet in its experts alone."""
        return ()


class MMoE(nnx.Module):
    """`model(batch, rng, train) -> (logits_BI, sums)`; reads `feature_BL`, `feature_weight_BL`
    and `row_B` of the batch.

    A row without features is padding, and its logits are
    those of the items' biases.
    """

    repeats: Any

    def __init__(self, key: Array, cfg: ModelConfig):
        self.cfg = cfg
        keys = jax.random.split(key, 4)
        ends = {"embed": embedding(cfg)} | _bottom(cfg)
        self.ends = Weights(keys[0], ends, cfg.param_dtype)
        self.prefix, self.repeats, self.suffix = stack(keys[1:], cfg, Look(mask=""))
        self.towers = Weights(jax.random.fold_in(key, 4), _towers(cfg), cfg.param_dtype)
        self.head = Weights(jax.random.fold_in(key, 5), _head(cfg), cfg.param_dtype)

    def __call__(self, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        cfg = self.cfg
        options = typed_options(Options, cfg.kind_options)
        feature_BL, weight_BL = batch.feature_BL, batch.feature_weight_BL
        # Told before any item is dropped: a row that lost all of them is no padding.
        valid_B = (weight_BL != 0).any(1)
        keys = jax.random.split(jax.random.fold_in(rng, 0), 2)
        # Which items are dropped follows from the row alone, so it is the same on every mesh.
        weight_BL = dropout(weight_BL, options.item_dropout if train else 0.0, keys[0], batch.row_B)
        table_VD = gather(self.ends["embed"], ("vocab", "embed"), cfg.dtype)
        h_BD = self._bottom(bags(table_VD, feature_BL, weight_BL) * embedding_scale(cfg))
        h_BD = dropout(h_BD, cfg.dropout if train else 0.0, keys[1], batch.row_B)
        # Each task is a token of the row, with the same vector; the router tells them apart by
        # their position.
        tasks = _as_tokens(batch, valid_B, len(options.items))
        x_BGD = jnp.broadcast_to(h_BD[:, None], (*tasks.id_BS.shape, cfg.d_model))
        x_BGD, sums = run_stack(self, x_BGD, tasks, rng, train)
        return self._scores(self._towers(x_BGD)), sums

    def _bottom(self, x_BD: Array) -> Array:
        """Returns h, what all tasks share."""
        w_DD = gather(self.ends["bottom"], ("embed", None), self.cfg.dtype)
        bias_D = self.ends["bottom_bias"].astype(self.cfg.dtype)
        # A row of many features has a large sum: the norm makes rows alike.
        x_BD = norm(x_BD, self.ends["bag_norm_scale"], self.cfg)
        h_BD = jnp.einsum("BD,DE->BE", x_BD, w_DD)
        return jax.nn.gelu(h_BD + bias_D[None])

    def _towers(self, x_BGD: Array) -> Array:
        """Returns t_g of every task, with the last norm."""
        w_GDD = gather(self.towers["w"], (None, "embed", None), self.cfg.dtype)
        h_BGD = norm(x_BGD, self.towers["norm_scale"], self.cfg)
        h_BGD = jax.nn.gelu(jnp.einsum("BGD,GDE->BGE", h_BGD, w_GDD))
        x_BGD = x_BGD + h_BGD
        return norm(x_BGD, self.ends["norm_scale"], self.cfg)

    def _scores(self, t_BGD: Array) -> Array:
        """Logits in at least float32; every task's tower meets its own items only."""
        wide = wide_dtype(t_BGD.dtype)
        w_DI = gather(self.head["w"], ("embed", None), self.cfg.dtype)
        items = typed_options(Options, self.cfg.kind_options).items
        ends = itertools.accumulate(items, initial=0)
        scores = []
        for g, (first, end) in enumerate(itertools.pairwise(ends)):
            t_BD, mine_DI = t_BGD[:, g], w_DI[:, first:end]
            scores.append(jnp.einsum("BD,DI->BI", t_BD, mine_DI, preferred_element_type=wide))
        bias_I = self.head["b"].astype(wide)
        return jnp.concatenate(scores, 1) + bias_I[None]


def _bottom(cfg: ModelConfig) -> dict[str, Weight]:
    d = cfg.d_model
    return {
        "bag_norm_scale": norm_scale(cfg),
        "bottom": Weight((d, d), ("embed", None), d**-0.5),
        "bottom_bias": Weight((d,), (None,), 0.0),
        "norm_scale": norm_scale(cfg),
    }


def _towers(cfg: ModelConfig) -> dict[str, Weight]:
    d, num_tasks = cfg.d_model, len(typed_options(Options, cfg.kind_options).items)
    w = Weight((num_tasks, d, d), (None, "embed", None), d**-0.5)
    return {"w": w, "norm_scale": norm_scale(cfg)}


def _head(cfg: ModelConfig) -> dict[str, Weight]:
    num_items = sum(typed_options(Options, cfg.kind_options).items)
    w = Weight((cfg.d_model, num_items), ("embed", None), cfg.d_model**-0.5)
    return {"w": w, "b": Weight((num_items,), (None,), 0.0)}


def _as_tokens(batch: Batch, valid_B: Array, num_tasks: int) -> Batch:
    """Returns every row as a sequence of its tasks: id and position are the task's number."""
    shape = (*valid_B.shape, num_tasks)
    task_1G = jnp.arange(num_tasks, dtype=jnp.int32)[None]
    task_BG = jax.sharding.reshard(jnp.broadcast_to(task_1G, shape), P(BATCH, None))
    valid_B1 = valid_B[:, None].astype(jnp.int32)
    return Batch(
        id_BS=task_BG,
        position_BS=task_BG,
        segment_BS=jnp.broadcast_to(valid_B1, shape),
        row_B=batch.row_B,
        request=batch.request,
    )


def bags(table_VD: Array, feature_BL: Array, weight_BL: Array) -> Array:
    """Returns [B, D]: an embedding bag of each row, on any mesh.

    Every row is summed as segments of its own, so none leaves its device.
    """
    x_BLD = table_VD.at[feature_BL].get(out_sharding=P(BATCH, None, None))

    def one(x_LD, weight_L):
        # All features are of row 0, the only one.
        row_L = jnp.zeros(weight_L.shape, jnp.int32)
        return bag_sum(x_LD, row_L, weight_L, 1)[0]

    return jax.vmap(one)(x_BLD, weight_BL)


def embedding_bag(
    table_VD: Array, feature_N: Array, row_N: Array, weight_N: Array, num_rows: int
) -> Array:
    """Returns [num_rows, D] of N (feature, row, weight) triples in any order, as a sum over
    segments; what has row >= num_rows is left out.
    """
    return bag_sum(table_VD.at[feature_N].get(), row_N, weight_N, num_rows)


def bag_sum(x_ND: Array, row_N: Array, weight_N: Array, num_rows: int) -> Array:
    """Returns [num_rows, D]: sums of weighted embeddings by row, added up in at least float32: a
    scatter rounds after every term.
    """
    wide = wide_dtype(x_ND.dtype)
    weight_N1 = weight_N.astype(wide)[:, None]
    weighted_ND = x_ND.astype(wide) * weight_N1
    sum_BD = jax.ops.segment_sum(weighted_ND, row_N, num_segments=num_rows)
    return sum_BD.astype(x_ND.dtype)


def from_csr(start_R: Sequence[int]) -> Array:
    """Returns row_N of the entries of a CSR matrix, from the places where its rows begin (one more
    than it has rows).
    """
    # Row i has start[i + 1] - start[i] entries.
    count_R = jnp.diff(jnp.asarray(start_R))
    row_R = jnp.arange(count_R.shape[0])
    # The length is told, so that the shape is known where this is traced.
    return jnp.repeat(row_R, count_R, total_repeat_length=int(start_R[-1]))


def parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    """Returns the Counts of an MMoE."""
    d, items = cfg.d_model, typed_options(Options, cfg.kind_options).items
    found = decoder(as_decoder(cfg))
    # The bottom has a bias, the tower of a task has none.
    bottom, towers = d * d + d, len(items) * d * d
    return found._replace(
        embedding=cfg.vocab_size * d,
        # Every item has a bias.
        head=(d + 1) * sum(items),
        attention=0,
        dense=found.dense + bottom + towers,
        # Of the bag, of the towers, of their results, and of each block.
        norms=3 * d + norms_of_part(cfg) * len(cfg.blocks) * d,
    )


def forward_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    """Returns the Breakdown of an MMoE's forward pass."""
    d, items = cfg.d_model, typed_options(Options, cfg.kind_options).items
    # The experts see a row as so many tokens, whatever its features are.
    num_tasks = len(items)
    found = decoder(as_decoder(cfg), num_tasks)

    def per_place(of_row):
        return round(of_row / seq_len)

    # Of the one gate that a task uses.
    gates = 2 * d * cfg.moe.num_experts * cfg.num_moe_layers
    bottom, tower = 2 * d * d, 2 * d * d
    # At every place the bag adds up a feature.
    bag = 2 * d
    return type(found)(
        attention_projections=0,
        attention_scores=0,
        dense=per_place(num_tasks * (found.dense + tower) + bottom) + bag,
        shared=per_place(num_tasks * found.shared),
        experts=per_place(num_tasks * found.experts),
        router=per_place(num_tasks * gates),
        head=per_place(2 * d * sum(items)),
    )


def refusals(cfg: Config) -> Iterator[str]:
    """Refuses a model without tasks, and a router whose gates are not as many as the tasks."""
    options, moe = typed_options(Options, cfg.model.kind_options), cfg.model.moe
    num_gates = ROUTERS[moe.router].num_gates(moe.router_options)
    if not options.items:
        yield (
            "model.kinds.mmoe.items = () must give every task its number of items: there is no task"
        )
    if num_gates and num_gates != len(options.items):
        yield (
            f"model.moe.routers.{moe.router}.num_gates ({num_gates}) must be the number of tasks: "
            f"model.kinds.mmoe.items {options.items} are {len(options.items)}"
        )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields few items of every task."""
    del seq_len
    yield "items", tuple(min(number, 16) for number in options["items"])


def random_inputs(
    options: Options, vocab_size: int, shape: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    """Returns baskets of items, (features [B, L], weights [B, L])."""
    del vocab_size
    feature_BL = rng.integers(0, sum(options.items), shape).astype(np.int32)
    return {"feature_BL": feature_BL, "feature_weight_BL": np.ones(shape)}


KIND = Kind(
    Options,
    MMoE,
    causal=False,
    parameters=parameters,
    forward_flops=forward_flops,
    writes_text=False,
    refusals=refusals,
    small=small,
    random_inputs=random_inputs,
)
