"""The encoder: one label for a row of tokens or of vectors (patches of an image, frames of speech).
Global view.

    tokens or vectors -> the blocks of the decoder, with attention to the whole segment -> final
    norm -> pooling over what is not padding -> a linear head in at least float32

Embedding, blocks and final norm have the names and first values that they have in a decoder of the
same sizes, so a language model is loaded by train.init_from; a linear probe is that with
optim.train_only="^head/", and attention="causal" leaves its mask as it was. Vectors are projected
by a matrix instead of looked up; patches have no natural order, so positions may be learned beside
the rotary ones (Dosovitskiy et al. 2021, ViT, arXiv:2010.11929, section 3.1; V-MoE,
arXiv:2106.05974, puts experts into it).

Shapes: B rows, S sequence, P width of a vector, D model, C classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.models.block import Look
from moe_jax.models.contract import Kind
from moe_jax.models.counting import Decoder, full
from moe_jax.models.decoder import as_decoder
from moe_jax.models.ends import FIRST_LOGITS, embed, embedding, norm_scale
from moe_jax.models.layers import dropout, gather, norm
from moe_jax.models.stack import run_stack, share, stack
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.precision import wide_dtype
from moe_jax.schema.blocks import KindOptions
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import BELOW_ONE, COUNT, NUMBER, at_least, option, typed_options
from moe_jax.weights import Weight, Weights

NAME = "encoder"


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    inputs: str = option(
        "tokens",
        'or "vectors": patches of an image, frames of speech',
        choices=("tokens", "vectors"),
    )
    input_dim: int = option(1, "width of a vector", NUMBER)
    num_classes: int = option(2, "labels of the data", at_least(2))
    pool: str = option(
        "mean",
        'over what is not padding: "sum", "mean", "max", "first"',
        choices=("sum", "mean", "max", "first"),
    )
    attention: str = option(
        "full",
        'to the whole segment, or "causal", as the language model that it begins from',
        choices=("full", "causal"),
    )
    learned_positions: int = option(
        0,
        "rows of a learned table of positions, at least data.seq_len; 0 = rotary embeddings alone",
        COUNT,
    )
    head_dropout: float = option(0.0, "of the pooled row", BELOW_ONE)
    token_dropout: float = option(
        0.0, "of whole places of the input (Iyyer et al. 2015, deep averaging networks)", BELOW_ONE
    )

    @property
    def masks(self) -> tuple[str, ...]:
        """Returns the mask that is asked for."""
        return (self.attention,)

    @property
    def embeds(self) -> bool:
        """Returns whether the inputs are tokens: vectors are projected instead."""
        return self.inputs == "tokens"


# As in ViT.
POSITION_STD = 0.02


class Encoder(nnx.Module):
    """`model(batch, rng, train) -> (logits_BC, sums)`; `batch.vectors_BSP` is read
    instead of ids where inputs = "vectors".
    """

    def __init__(self, key: Array, cfg: ModelConfig):
        self.cfg = cfg
        options = typed_options(Options, cfg.kind_options)
        keys = jax.random.split(key, 4)
        self.ends = Weights(keys[0], _ends(cfg), cfg.param_dtype)
        look = Look(options.attention)
        self.prefix, self.repeats, self.suffix = stack(keys[1:], cfg, look)
        share(self, key)
        # A sum over many tokens begins with small logits too.
        std = FIRST_LOGITS * cfg.d_model**-0.5
        head = {
            "w": Weight((cfg.d_model, options.num_classes), ("embed", None), std),
            "b": Weight((options.num_classes,), (None,), 0.0),
        }
        self.head = Weights(jax.random.fold_in(key, 4), head, cfg.param_dtype)

    def __call__(self, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        cfg, options = self.cfg, typed_options(Options, self.cfg.kind_options)
        # Number 0: blocks are counted from 1.
        keys = jax.random.split(jax.random.fold_in(rng, 0), 2)
        x_BSD = self._embed(batch)
        x_BSD = dropout(x_BSD, cfg.dropout if train else 0.0, keys[0], batch.row_B)
        if train and options.token_dropout:
            # One number for each place: a token is dropped whole.
            one_BS1 = jnp.ones_like(x_BSD[:, :, :1])
            key = jax.random.fold_in(keys[0], 1)
            x_BSD = x_BSD * dropout(one_BS1, options.token_dropout, key, batch.row_B)
        # Blocks have no use for the vectors, which would travel with the batch.
        tokens = batch._replace(vectors_BSP=())
        x_BSD, sums = run_stack(self, x_BSD, tokens, rng, train)
        x_BSD = norm(x_BSD, self.ends["norm_scale"], cfg)
        # A row has many tokens: they are added up in at least float32.
        wide = wide_dtype(x_BSD.dtype)
        # Padding is of segment 0.
        x_BD = pool(x_BSD.astype(wide), batch.segment_BS > 0, options.pool)
        x_BD = dropout(x_BD, options.head_dropout if train else 0.0, keys[1], batch.row_B)
        w_DC = gather(self.head["w"], ("embed", None), wide)
        bias_C = self.head["b"].astype(wide)
        return jnp.einsum("BD,DC->BC", x_BD, w_DC) + bias_C[None], sums

    def _embed(self, batch: Batch) -> Array:
        """Returns the input as vectors of the residual stream, [B, S, D]."""
        cfg, options = self.cfg, typed_options(Options, self.cfg.kind_options)
        if options.embeds:
            x_BSD = embed(self.ends["embed"], batch.id_BS, cfg)
        else:
            w_PD = gather(self.ends["input"], (None, "embed"), cfg.dtype)
            bias_D = self.ends["input_bias"].astype(cfg.dtype)
            x_BSD = jnp.einsum("BSP,PD->BSD", batch.vectors_BSP.astype(cfg.dtype), w_PD)
            x_BSD = x_BSD + bias_D[None, None]
        if options.learned_positions:
            table = gather(self.ends["position"], (None, "embed"), cfg.dtype)
            x_BSD = x_BSD + table.at[batch.position_BS].get(out_sharding=P(BATCH, None, None))
        return x_BSD


def _ends(cfg: ModelConfig) -> dict[str, Weight]:
    d, options = cfg.d_model, typed_options(Options, cfg.kind_options)
    ends = {"norm_scale": norm_scale(cfg)}
    if options.embeds:
        ends["embed"] = embedding(cfg)
    else:
        width = options.input_dim
        ends |= {
            "input": Weight((width, d), (None, "embed"), width**-0.5),
            "input_bias": Weight((d,), (None,), 0.0),
        }
    if options.learned_positions:
        ends["position"] = Weight((options.learned_positions, d), (None, "embed"), POSITION_STD)
    return ends


def pool(x_BSD: Array, valid_BS: Array, how: str) -> Array:
    """Returns [B, D] of the valid tokens: their "sum", "mean" or "max", or the "first" of them;
    zero for a row without any.
    """
    valid_BS1 = valid_BS[:, :, None]
    # A row of padding alone has no largest number, and none to divide by.
    if how == "max":
        top_BD = jnp.where(valid_BS1, x_BSD, -jnp.inf).max(1)
        return jnp.where(valid_BS.any(1)[:, None], top_BD, 0)
    if how == "first":
        # The one place that is valid and has no valid place before it.
        valid_BS1 = valid_BS1 & (jnp.cumsum(valid_BS1, 1) == 1)
    sum_BD = jnp.where(valid_BS1, x_BSD, 0).sum(1)
    if how != "mean":
        return sum_BD
    # A row of padding alone is divided by 1.
    num_B1 = jnp.maximum(valid_BS1.sum(1), 1)
    return sum_BD / num_B1.astype(x_BSD.dtype)


def parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    """Returns the Counts of an encoder."""
    options, d = typed_options(Options, cfg.kind_options), cfg.d_model
    # A vector is projected, with a bias.
    entry = cfg.vocab_size * d if options.embeds else (options.input_dim + 1) * d
    found = decoder(as_decoder(cfg))
    return found._replace(
        embedding=entry + options.learned_positions * d, head=(d + 1) * options.num_classes
    )


def forward_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    """Returns the Breakdown of an encoder's forward pass."""
    options, d = typed_options(Options, cfg.kind_options), cfg.d_model
    found = decoder(as_decoder(cfg), seq_len)
    # A row of the table is looked up without a product.
    entry = 0 if options.embeds else 2 * options.input_dim * d
    scores = found.attention_scores
    if options.attention == "full":
        scores = full(cfg, seq_len)
    # A row has one label: its places share the cost of the head.
    head = round(2 * d * options.num_classes / seq_len)
    return found._replace(attention_scores=scores, head=entry + head)


def refusals(cfg: Config) -> Iterator[str]:
    """Refuses rows that are longer than there are learned positions."""
    num = typed_options(Options, cfg.model.kind_options).learned_positions
    if 0 < num < cfg.data.seq_len:
        yield (
            f"model.kinds.encoder.learned_positions ({num}) must be at least data.seq_len "
            f"({cfg.data.seq_len}), or 0"
        )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields a table as long as a row, where there is one, and narrow vectors."""
    yield "learned_positions", seq_len if options["learned_positions"] else 0
    yield "input_dim", min(options["input_dim"], 8)


def random_inputs(
    options: Options, vocab_size: int, shape: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    """Returns vectors [B, S, P], where the inputs are no tokens."""
    del vocab_size
    return {} if options.embeds else {"vectors_BSP": rng.normal(size=(*shape, options.input_dim))}


KIND = Kind(
    Options,
    Encoder,
    causal=False,
    parameters=parameters,
    forward_flops=forward_flops,
    writes_text=False,
    refusals=refusals,
    small=small,
    random_inputs=random_inputs,
)
