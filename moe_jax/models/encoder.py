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

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.decoder import FIRST_LOGITS, Context, Look, embed, embedding, run_stack, stack
from moe_jax.models.layers import dropout, gather, rms_norm
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight, Weights

POSITION_STD = 0.02  # as in ViT


class Encoder(nnx.Module):
    """`model(batch, rng, train) -> (logits_BC, sums)`; `batch.vectors_BSP` is read
    instead of ids where inputs = "vectors".
    """

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        self.cfg = cfg
        keys = jax.random.split(key, 4)
        self.ends = Weights(keys[0], _ends(cfg), cfg.param_dtype)
        self.prefix, self.repeats, self.suffix = stack(
            keys[1:], cfg, Look(cfg.kind_options["attention"])
        )
        num_classes = cfg.kind_options["num_classes"]
        head = {  # a sum over many tokens begins with small logits too
            "w": Weight(
                (cfg.d_model, num_classes), ("embed", None), FIRST_LOGITS * cfg.d_model**-0.5
            ),
            "b": Weight((num_classes,), (None,), 0.0),
        }
        self.head = Weights(jax.random.fold_in(key, 4), head, cfg.param_dtype)

    def __call__(
        self, batch: Batch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        cfg, options = self.cfg, self.cfg.kind_options
        keys = jax.random.split(jax.random.fold_in(rng, 0), 2)
        x = dropout(self._embed(batch), cfg.dropout if train else 0.0, keys[0], batch.row_B)
        if train and options["token_dropout"]:
            one_BS1 = jnp.ones_like(x[:, :, :1])
            x = x * dropout(
                one_BS1, options["token_dropout"], jax.random.fold_in(keys[0], 1), batch.row_B
            )
        context = Context(batch._replace(vectors_BSP=()), rng, jnp.int32(1))
        x, sums = run_stack(self, x, context, train)
        x = rms_norm(x, self.ends["norm_scale"], cfg.norm_epsilon)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x_BD = pool(x.astype(wide), batch.segment_BS > 0, options["pool"])
        x_BD = dropout(x_BD, options["head_dropout"] if train else 0.0, keys[1], batch.row_B)
        w_DC = gather(self.head["w"], ("embed", None), str(wide))
        return jnp.einsum("BD,DC->BC", x_BD, w_DC) + self.head["b"].astype(wide)[None], sums

    def _embed(self, batch: Batch) -> jax.Array:
        cfg, options = self.cfg, self.cfg.kind_options
        if options["inputs"] == "tokens":
            x = embed(self.ends["embed"], batch.id_BS, cfg)
        else:
            w_PD = gather(self.ends["input"], (None, "embed"), cfg.dtype)
            x = jnp.einsum("BSP,PD->BSD", batch.vectors_BSP.astype(cfg.dtype), w_PD)
            x = x + self.ends["input_bias"].astype(cfg.dtype)[None, None]
        if options["learned_positions"]:
            table = gather(self.ends["position"], (None, "embed"), cfg.dtype)
            x = x + table.at[batch.position_BS].get(out_sharding=P(BATCH, None, None))
        return x


def _ends(cfg: ModelConfig) -> dict[str, Weight]:
    d, options = cfg.d_model, cfg.kind_options
    ends = {"norm_scale": Weight((d,), (None,), 0.0, 1.0)}
    if options["inputs"] == "tokens":
        ends["embed"] = embedding(cfg)
    else:
        width = options["input_dim"]
        ends |= {
            "input": Weight((width, d), (None, "embed"), width**-0.5),
            "input_bias": Weight((d,), (None,), 0.0),
        }
    if options["learned_positions"]:
        ends["position"] = Weight((options["learned_positions"], d), (None, "embed"), POSITION_STD)
    return ends


def pool(x_BSD: jax.Array, valid_BS: jax.Array, how: str) -> jax.Array:
    """[B, D] of the valid tokens: their "sum", "mean" or "max", or the "first" of them; zero for a
    row without any.
    """
    valid_BS1 = valid_BS[:, :, None]
    if how == "max":
        top_BD = jnp.where(valid_BS1, x_BSD, -jnp.inf).max(1)
        return jnp.where(valid_BS.any(1)[:, None], top_BD, 0)
    if how == "first":
        valid_BS1 = valid_BS1 & (jnp.cumsum(valid_BS1, 1) == 1)
    sum_BD = jnp.where(valid_BS1, x_BSD, 0).sum(1)
    return (
        sum_BD / jnp.maximum(valid_BS1.sum(1), 1).astype(x_BSD.dtype) if how == "mean" else sum_BD
    )
