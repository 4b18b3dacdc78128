"""What Gemma's families share: GEGLU, embeddings times sqrt(hidden_size), norms that multiply by
1 + their scale, and a head that is the embedding.

A family's file has what its models have beside these (families/gemma.py and its like).
"""

from typing import Any

from moe_jax.interchange import decoder
from moe_jax.interchange.entries import Entry, Ours, fixed, ignored, key, only
from moe_jax.interchange.rows import Row
from moe_jax.interchange.settings import Settings

# Old configs have the first name for the second one, which is meant by both.
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")
HEAD_DIM = 256
SCALE = "model.attention_scale"


def shared(activation: str) -> tuple[Entry, ...]:
    """Returns the entries that all have; `activation`: the key that names it."""
    return (
        *decoder.widths(norm_epsilon=1e-6, tied=True),
        # 0 stands for sqrt(hidden_size).
        fixed(model__embedding_scale=0.0, model__norm_plus_one=True),
        gelu(activation),
        decoder.heads(head_dim=HEAD_DIM),
        decoder.biases_of_all(),
        decoder.layers("dense"),
        key("intermediate_size", "model.ffn_hidden"),
        only("use_bidirectional_attention", False, "Gemma that sees later tokens"),
        # How transformers keeps keys and values.
        ignored("cache_implementation"),
    )


def gelu(name: str) -> Entry:
    """Returns the entry of GEGLU's activation, which configs tell by one key or two."""

    def read(settings: Settings) -> dict[str, Any]:
        for one in ("hidden_act", "hidden_activation"):
            if settings.get(one, ACTIVATIONS[1]) not in ACTIVATIONS:
                raise settings.refusal(
                    one, f"moe_jax has no other activation of GEGLU's gate than {ACTIVATIONS[1]}"
                )
        return {"model.activation": "geglu"}

    def write(config: Ours) -> dict[str, Any]:
        del config
        return {name: ACTIVATIONS[1]}

    return Entry(read, write)


def scores() -> Entry:
    """Returns the entry of the factor on scores: query_pre_attn_scalar ** -0.5."""
    name = "query_pre_attn_scalar"

    def read(settings: Settings) -> dict[str, Any]:
        scalar = settings.number(name, HEAD_DIM)
        # 0 stands for the width of a head.
        is_width = scalar == settings.number("head_dim", HEAD_DIM)
        return {SCALE: 0.0 if is_width else scalar**-0.5}

    def write(config: Ours) -> dict[str, Any]:
        scale = config[SCALE]
        # Where that is no whole number, what is read again differs, and is refused.
        return {name: max(1, round(scale**-2)) if scale else config["model.head_dim"]}

    return Entry(read, write)


def cap(theirs: str, ours: str, default: float) -> Entry:
    """Returns the entry of a soft cap, of which null says that there is none.

    `default`: what it is where it is not told; 0 = there is none.
    """

    def read(settings: Settings) -> dict[str, Any]:
        untold = 0.0 if settings.has(theirs) else default
        return {ours: float(settings.get(theirs, untold))}

    def write(config: Ours) -> dict[str, Any]:
        return {theirs: config[ours] or None}

    return Entry(read, write)


# The axes of rows are those of decoder.py.
NORMS_OF_BOTH = (
    Row("norms/attention_norm_scale", "D", "input_layernorm.weight", "D"),
    Row("norms/attention_after_norm_scale", "D", "post_attention_layernorm.weight", "D"),
    Row("norms/ffn_norm_scale", "D", "pre_feedforward_layernorm.weight", "D"),
    Row("norms/ffn_after_norm_scale", "D", "post_feedforward_layernorm.weight", "D"),
)
ATTENTION = (*decoder.ATTENTION, *decoder.ATTENTION_BIASES, *decoder.OUTPUT_BIAS)
