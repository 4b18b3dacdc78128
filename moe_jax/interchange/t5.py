"""What T5 and its descendants share (Raffel et al. 2019, arXiv:1910.10683): encoder-decoders with a
relative position bias in the first layer of each stack, scores without a scale, RMSNorm before
each part, no biases, and a tied head that reads d_model ** -0.5 of the last norm.

Axes of rows: V vocabulary, D model, H query heads, G key heads (as many), A head width, L buckets,
P parts of the first matrix, F hidden, E experts.
"""

from typing import Any, NamedTuple

from moe_jax.interchange.entries import Entry, Ours, fixed, ignored, key
from moe_jax.interchange.meaning import BLOCKS, ENCODER_BLOCKS, LAYER_ATTENTIONS
from moe_jax.interchange.rows import Row
from moe_jax.interchange.settings import Settings

RELATIVE = "relative_bias"
TIED, HEAD_SCALE = "model.tie_embeddings", "model.head_scale"
# Copies of the embedding, and a bias of cross-attention that older versions wrote and none reads.
BUFFERS = ("embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight")

# Entries.


def sizes(d_model: int) -> tuple[Entry, ...]:
    """Returns the entries that all of them have; `d_model`: where it is not told."""
    at = f"model.attentions.{RELATIVE}"
    return (
        fixed(
            task="translation",
            model__kind="encdec",
            model__embedding_scale=1.0,
            model__attention_scale=1.0,
        ),
        key("vocab_size", "model.vocab_size", 32128),
        key("d_model", "model.d_model", d_model, also="hidden_size"),
        key("d_kv", "model.head_dim", 64, also="head_dim"),
        key("layer_norm_epsilon", "model.norm_epsilon", 1e-6),
        key("relative_attention_num_buckets", f"{at}.buckets", 32),
        key("relative_attention_max_distance", f"{at}.max_distance", 128),
        # Of training alone, or of other heads than that of a language model.
        ignored("dropout_rate", "initializer_factor", "classifier_dropout", "n_positions"),
        ignored("task_specific_params", "add_cross_attention"),
    )


def heads(number: int) -> Entry:
    """Returns the entry of the heads, of which each has keys of its own; `number`: where it is not
    told.
    """

    def read(settings: Settings) -> dict[str, Any]:
        untold = settings.get("num_attention_heads", number)
        told = settings.number("num_heads", untold)
        return {"model.num_heads": told, "model.num_kv_heads": told}

    def write(config: Ours) -> dict[str, Any]:
        return {"num_heads": config["model.num_heads"]}

    return Entry(read, write)


def head_scale(settings: Settings, scaled: bool, d_model: int) -> float:
    """Returns the factor on what the head reads; `d_model`: where it is not told."""
    told = settings.number("d_model", settings.get("hidden_size", d_model))
    return told**-0.5 if scaled else 1.0


class Stacks(NamedTuple):
    """How many layers both stacks have."""

    encoder: int
    decoder: int


def stacks(settings: Settings, number: int, number_of_decoder: int | None) -> Stacks:
    """Returns how many layers there are; the numbers are those where they are not told, None = as
    many as in the encoder.
    """
    encoder = settings.number("num_layers", settings.get("num_hidden_layers", number))
    return Stacks(encoder, settings.number("num_decoder_layers", number_of_decoder or encoder))


def laid_out(encoder: tuple[str, ...], decoder: tuple[str, ...]) -> dict[str, Any]:
    """Returns keys of ours of the kinds of both stacks' blocks."""
    return {
        ENCODER_BLOCKS: encoder,
        BLOCKS: decoder,
        LAYER_ATTENTIONS: (RELATIVE,) * len(decoder),
    }


def written_stacks(config: Ours) -> dict[str, Any]:
    """Returns how many layers there are, in their words."""
    # A model of another kind has no encoder: what is written will differ in its kind.
    return {
        "num_layers": len(config.get(ENCODER_BLOCKS, ("none",))),
        "num_decoder_layers": len(config[BLOCKS]),
    }


# Rows.

ENDS = (
    Row("ends/embed", "VD", "shared.weight", "V D"),
    Row("ends/head", "DV", "lm_head.weight", "V D"),
    Row("ends/norm_scale", "D", "decoder.final_layer_norm.weight", "D"),
    Row("encoder/ends/norm_scale", "D", "encoder.final_layer_norm.weight", "D"),
    *(
        Row(
            f"{ours}shared/relative_bias",
            "LH",
            f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "L H",
        )
        for ours, theirs in (("encoder/", "encoder"), ("", "decoder"))
    ),
)


def attention(ours: str, norm: str, layer: int, theirs: str) -> tuple[Row, ...]:
    """Returns the rows of an attention and the norm before it."""
    return (
        Row(f"norms/{norm}_norm_scale", "D", f"layer.{layer}.layer_norm.weight", "D"),
        Row(f"{ours}/weights/q", "DHA", f"layer.{layer}.{theirs}.q.weight", "HA D"),
        Row(f"{ours}/weights/k", "DGA", f"layer.{layer}.{theirs}.k.weight", "GA D"),
        Row(f"{ours}/weights/v", "DGA", f"layer.{layer}.{theirs}.v.weight", "GA D"),
        Row(f"{ours}/weights/o", "HAD", f"layer.{layer}.{theirs}.o.weight", "D HA"),
    )


ENCODER = attention("attention", "attention", 0, "SelfAttention")
DECODER = (*ENCODER, *attention("cross", "cross", 1, "EncDecAttention"))


def feed_forward(layer: int, theirs: str) -> tuple[Row, ...]:
    """Returns the rows of a dense feed-forward and the norm before it."""
    before = f"layer.{layer}.{theirs}."
    return (
        Row("norms/ffn_norm_scale", "D", f"layer.{layer}.layer_norm.weight", "D"),
        Row("dense/weights/w_in", "DPF", before + "wi.weight", "PF D", sizes={"P": 1}),
        Row("dense/weights/w_in", "DPF", before + "wi_{P}.weight", "F D", sizes={"P": 2}),
        Row("dense/weights/w_out", "FD", before + "wo.weight", "D F"),
    )
