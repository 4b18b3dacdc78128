"""The model of the article that this project started from: embedding, sparse experts, aggregation,
softmax. No attention.

    e_j = E[:, v_j]                   the embedding of the token at place j of a window of m input
                                      places
    z_i = f(sum over j of w_ij e_j)   expert i of n: a weighted sum of the window's embeddings, one
                                      number w_ij for each place
    h   = g(z_1 .. z_n)               "sum", "mean", or "gated": sum of p_i z_i with
                                      p = softmax(mean of the window's e_j, times G)
    y   = softmax(h O)                a fully connected layer and the softmax (sections 2.4 and 4.1
                                      of the article)

w [n, m] is the sparse matrix of the article's section 3; what keeps most of it at zero is
model.moe.sparse, as for any expert. With f the identity, sum and mean make the experts one linear
map of the window, whatever n is; docs/article.md has the worked example.

Next token (num_classes = 0): the window of a token is itself and the m - 1 tokens before it, as far
as they belong to its segment; place m is the token itself. Classification: the window is the row; a
row has at most m tokens, and what is padding counts as zero.

Shapes: B rows, S sequence, D embedding, n experts, m places, V vocabulary, C classes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.models.contract import Kind
from moe_jax.models.counting import Decoder
from moe_jax.models.decoder import as_decoder
from moe_jax.models.layers import gather
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.precision import wide_dtype
from moe_jax.schema.blocks import KindOptions, Stack
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import NO_LABEL_OR_MORE, NUMBER, option, typed_options
from moe_jax.weights import Weight, Weights

NAME = "article"
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda z: z,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
}
AGGREGATES = ("sum", "mean", "gated")


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    num_experts: int = option(64, "experts, each a weighted sum of the window", NUMBER)
    window: int = option(
        16, "input places that an expert weighs: the last tokens, or the whole row", NUMBER
    )
    aggregate: str = option("sum", 'of the experts: "sum", "mean", "gated"', choices=AGGREGATES)
    activation: str = option(
        "gelu", 'of an expert: "identity", "relu", "gelu"', choices=tuple(ACTIVATIONS)
    )
    num_classes: int = option(0, "0 = the next token", NO_LABEL_OR_MORE)

    @property
    def masks(self) -> tuple[str, ...]:
        """Returns none: a window of tokens is weighed by place alone."""
        return ()

    def stacks(self, own: Stack) -> dict[str, Stack]:
        """Returns none: the model is made of no blocks."""
        del own
        return {}


class Article(nnx.Module):
    """`model(batch, rng, train) -> (logits, {})`.

    The logits are [B, S, V] of the next token, or [B, C] of a row's class. Nothing in it is random.
    """

    def __init__(self, key: Array, cfg: ModelConfig):
        options = typed_options(Options, cfg.kind_options)
        self.cfg, self.options = cfg, options
        keys = jax.random.split(key, 3)
        d, n, m = cfg.d_model, options.num_experts, options.window
        num_outputs = options.num_classes or cfg.vocab_size
        ends = {
            "embed": Weight((cfg.vocab_size, d), ("vocab", "embed"), d**-0.5),
            "head": Weight((d, num_outputs), self._head_names(), d**-0.5),
        }
        experts = {"w": Weight((n, m), ("experts", None), m**-0.5)}
        self.ends = Weights(keys[0], ends, cfg.param_dtype)
        self.experts = Weights(keys[1], experts, cfg.param_dtype)
        if options.aggregate == "gated":
            gate = {"gate": Weight((d, n), ("embed", None), d**-0.5)}
            self.router = Weights(keys[2], gate, cfg.param_dtype)

    def __call__(self, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        del rng, train
        cfg, classify = self.cfg, self.options.num_classes > 0
        table_VD = gather(self.ends["embed"], ("vocab", "embed"), cfg.dtype)
        e_BSD = table_VD.at[batch.id_BS].get(out_sharding=P(BATCH, None, None))
        # A few numbers for each expert: every device takes all of them.
        w_nm = jax.sharding.reshard(self.experts["w"].astype(cfg.dtype), P())
        if classify:
            # One window a row, whose places are as many as the row has.
            seen_Bqm = (batch.segment_BS > 0)[:, None]
            window_BqmD = e_BSD[:, None]
            w_nm = w_nm[:, : e_BSD.shape[1]]
        else:
            window_BqmD, seen_Bqm = windows(e_BSD, batch.segment_BS, w_nm.shape[1])
        # A place without a token adds nothing.
        window_BqmD = jnp.where(seen_Bqm[..., None], window_BqmD, 0)
        z_BqnD = jnp.einsum("BqmD,nm->BqnD", window_BqmD, w_nm)
        z_BqnD = ACTIVATIONS[self.options.activation](z_BqnD)
        h_BqD = self._aggregate(z_BqnD, window_BqmD, seen_Bqm)
        logits = self._output(h_BqD)
        return logits[:, 0] if classify else logits, {}

    def _aggregate(self, z_BqnD: Array, window_BqmD: Array, seen_Bqm: Array) -> Array:
        """Returns g(z_1 .. z_n) [B, q, D]."""
        how = self.options.aggregate
        if how == "sum":
            return z_BqnD.sum(2)
        if how == "mean":
            return z_BqnD.mean(2)
        # A window at the beginning of a segment has fewer tokens than places.
        num_Bq = jnp.maximum(seen_Bqm.sum(2), 1)
        num_Bq1 = num_Bq[..., None].astype(z_BqnD.dtype)
        mean_BqD = window_BqmD.sum(2) / num_Bq1
        gate_Dn = gather(self.router["gate"], ("embed", None), self.cfg.dtype)
        logits_Bqn = jnp.einsum("BqD,Dn->Bqn", mean_BqD, gate_Dn)
        p_Bqn = jax.nn.softmax(logits_Bqn)
        return jnp.einsum("Bqn,BqnD->BqD", p_Bqn, z_BqnD)

    def _head_names(self) -> tuple[str, str | None]:
        """Returns the logical dimensions of the head; only a vocabulary is split."""
        return "embed", None if self.options.num_classes else "vocab"

    def _output(self, h_BqD: Array) -> Array:
        """Returns logits in at least float32."""
        head = gather(self.ends["head"], self._head_names(), self.cfg.dtype)
        wide = wide_dtype(h_BqD.dtype)
        return jnp.einsum("BqD,DV->BqV", h_BqD, head, preferred_element_type=wide)


def windows(e_BSD: Array, segment_BS: Array, m: int) -> tuple[Array, Array]:
    """Returns (window [B, S, m, D], which of it there is [B, S, m]): of every token the m tokens
    that end with it, within its segment.
    """
    S = e_BSD.shape[1]

    def earlier(z, by):
        """Returns what stands `by` places before each token; zero before the row."""
        padding = [(0, 0), (by, 0)] + [(0, 0)] * (z.ndim - 2)
        return jnp.pad(z, padding)[:, :S]

    tokens, same = [], []
    # The token itself has the last place.
    for by in range(m - 1, -1, -1):
        tokens.append(earlier(e_BSD, by))
        # Segment 0 is padding, and what stands before the row.
        same.append((earlier(segment_BS, by) == segment_BS) & (segment_BS > 0))
    return jnp.stack(tokens, 2), jnp.stack(same, 2)


def parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    """Returns the Counts of the article's model."""
    options, d = typed_options(Options, cfg.kind_options), cfg.d_model
    # The record of a decoder, with nothing in it: this room does not import that of the counts.
    counts = type(decoder(as_decoder(cfg)))
    nothing = counts(*(0 for _ in counts._fields))
    experts = options.num_experts * options.window
    gated = options.aggregate == "gated"
    return nothing._replace(
        embedding=cfg.vocab_size * d,
        head=d * (options.num_classes or cfg.vocab_size),
        experts=experts,
        # Every token goes through all of them.
        experts_active=experts,
        router=d * options.num_experts if gated else 0,
    )


def forward_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    """Returns the Breakdown of the article's model's forward pass."""
    options, d = typed_options(Options, cfg.kind_options), cfg.d_model
    num, places, outputs = options.num_experts, options.window, cfg.vocab_size
    # A token is asked for at every place, a class once in a row.
    asked_every = 1
    if options.num_classes:
        outputs, asked_every = options.num_classes, seq_len
        places = min(places, seq_len)
    breakdown = type(decoder(as_decoder(cfg), seq_len))
    nothing = breakdown(*(0 for _ in breakdown._fields))
    # The gates themselves, and the sum that they weigh.
    gates = 2 * d * num + 2 * num * d if options.aggregate == "gated" else 0
    return nothing._replace(
        experts=math.ceil(2 * num * places * d / asked_every),
        router=math.ceil(gates / asked_every),
        head=math.ceil(2 * d * outputs / asked_every),
    )


def refusals(cfg: Config) -> Iterator[str]:
    """Refuses experts that the mesh does not split evenly, and a window that is shorter than a row
    where the window is the row.
    """
    options = typed_options(Options, cfg.model.kind_options)
    if options.num_experts % cfg.mesh.expert:
        yield (
            f"model.kinds.article.num_experts ({options.num_experts}) must be divisible by "
            f"mesh.expert ({cfg.mesh.expert})"
        )
    if options.num_classes and options.window < cfg.data.seq_len:
        yield (
            f"model.kinds.article.window ({options.window}) must be at least data.seq_len "
            f"({cfg.data.seq_len}): the window of a class is the row"
        )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields 8 experts, one for each simulated device, and a window of a row at most."""
    yield "num_experts", 8
    # The window of a class is the row.
    yield "window", seq_len if options["num_classes"] else min(options["window"], seq_len)


KIND = Kind(
    Options,
    Article,
    causal=True,
    parameters=parameters,
    forward_flops=forward_flops,
    writes_text=False,
    refusals=refusals,
    small=small,
)
