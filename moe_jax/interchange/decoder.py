"""What families of decoders share: entries of their configs, and rows of their tensors.

They descend from Llama (Touvron et al. 2023, arXiv:2302.13971), in its names too: RMSNorm, rotary
embeddings whose pairs are the halves of a head, SwiGLU, no scale on embeddings.

Axes of rows: V vocabulary, D model, H query heads, G key-value heads, A head width, P = 2 (gate,
up), F hidden, E experts.
"""

from collections.abc import Callable
from typing import Any

from moe_jax.interchange.entries import Entry, Ours, fixed, ignored, key, only
from moe_jax.interchange.meaning import BLOCKS, LAYER_ATTENTIONS
from moe_jax.interchange.rows import Row
from moe_jax.interchange.settings import Settings

FULL, WINDOWED = "grouped_query", "sliding_window"
WINDOW = f"model.attentions.{WINDOWED}.window"

# Entries.


def sizes(norm_epsilon: float, activation: str = "swiglu") -> tuple[Entry, ...]:
    """Returns the entries that families with SwiGLU have."""
    return (
        *widths(norm_epsilon, tied=False),
        fixed(model__activation=activation, model__embedding_scale=1.0),
        only("hidden_act", "silu", "other activation of SwiGLU's gate"),
    )


def widths(norm_epsilon: float, tied: bool) -> tuple[Entry, ...]:
    """Returns the entries that every one of these families has; `tied`: whether the head is the
    embedding where it is not told.
    """
    return (
        fixed(model__kind="decoder"),
        key("vocab_size", "model.vocab_size"),
        key("hidden_size", "model.d_model"),
        key("rms_norm_eps", "model.norm_epsilon", norm_epsilon),
        key("tie_word_embeddings", "model.tie_embeddings", tied),
        ignored("attention_dropout"),
    )


def heads(head_dim: int | None = None) -> Entry:
    """Returns the entry of the heads; `head_dim`: where it is not told, None = hidden_size over
    heads.
    """

    def read(settings: Settings) -> dict[str, Any]:
        ours = _number_of_heads(settings)
        # What a head has where no key says otherwise: its part of the model's width.
        own_share = settings.number("hidden_size") // ours["model.num_heads"]
        return ours | {"model.head_dim": settings.number("head_dim", head_dim or own_share)}

    def write(config: Ours) -> dict[str, Any]:
        return _written_heads(config) | {"head_dim": config["model.head_dim"]}

    return Entry(read, write)


def heads_of_whole_width() -> Entry:
    """Returns the entry of heads that share hidden_size."""

    def read(settings: Settings) -> dict[str, Any]:
        ours = _number_of_heads(settings)
        return ours | {"model.head_dim": settings.number("hidden_size") // ours["model.num_heads"]}

    return Entry(read, _written_heads)


def _number_of_heads(settings: Settings) -> dict[str, Any]:
    """Returns our keys of the numbers of heads; without grouping each head has keys of its own."""
    num_heads = settings.number("num_attention_heads")
    num_kv_heads = settings.number("num_key_value_heads", num_heads)
    return {"model.num_heads": num_heads, "model.num_kv_heads": num_kv_heads}


def _written_heads(config: Ours) -> dict[str, Any]:
    """Returns their entries of the numbers of heads."""
    return {
        "num_attention_heads": config["model.num_heads"],
        "num_key_value_heads": config["model.num_kv_heads"],
    }


def biases_of_all(default: bool = False) -> Entry:
    """Returns the entry of `attention_bias`, which is of all four projections."""

    def read(settings: Settings) -> dict[str, Any]:
        value = settings.get("attention_bias", default)
        return {"model.attention_bias": value, "model.output_bias": value}

    def write(config: Ours) -> dict[str, Any]:
        return {"attention_bias": config["model.attention_bias"]}

    return Entry(read, write)


def window(length: int | None = None) -> Entry:
    """Returns the entry of `sliding_window`, which all layers have or none (null); `length`: where
    it is not told.
    """

    def read(settings: Settings) -> dict[str, Any]:
        return _windowed(_told(settings, length), settings.number("num_hidden_layers"))

    def write(config: Ours) -> dict[str, Any]:
        return {"sliding_window": config.get(WINDOW)}

    return Entry(read, write)


def window_if_used(length: int = 4096) -> Entry:
    """Returns the entry of `sliding_window`, which all layers have if `use_sliding_window`;
    `length`: where it is not told.
    """

    def read(settings: Settings) -> dict[str, Any]:
        size = _told(settings, length)
        used = settings.get("use_sliding_window", False)
        return _windowed(size if used else None, settings.number("num_hidden_layers"))

    def write(config: Ours) -> dict[str, Any]:
        size = config.get(WINDOW)
        return {"use_sliding_window": size is not None, "sliding_window": size}

    return Entry(read, write)


def every_other_layer(layer: int, max_window_layers: int) -> bool:
    """Returns whether a layer has the window in gpt-oss and Gemma 2: the first one and every other
    after it.
    """
    del max_window_layers
    return layer % 2 == 0


def last_layers(layer: int, max_window_layers: int) -> bool:
    """Returns whether a layer has the window in most families: those from max_window_layers on."""
    return layer >= max_window_layers


def window_by_layer(
    slides: Callable[[int, int], bool],
    last: int,
    length: int = 4096,
    switch: str = "use_sliding_window",
    needed: bool = False,
) -> Entry:
    """Returns the entry of keys that may give some layers a window.

    Args:
      slides: (layer, max_window_layers) -> whether a layer has a window, where layer_types is not
        there.
      last, length: max_window_layers and sliding_window where they are not there; last = 0: there
        is no max_window_layers.
      switch: the key that says whether there are windows at all; "" = there are.
      needed: sliding_window is there even if no layer has one.
    """
    full, sliding = "full_attention", "sliding_attention"

    def read(settings: Settings) -> dict[str, Any]:
        used = settings.get(switch, False) if switch else True
        size = _told(settings, length)
        bound = settings.get("max_window_layers", last) if last else 0
        layers = range(settings.number("num_hidden_layers"))
        # The list decides where it is there; older files have the other keys alone.
        kinds = settings.get("layer_types")
        if kinds is None:
            used = used and size is not None
            kinds = [sliding if used and slides(layer, bound) else full for layer in layers]
        # Their words for an attention, and ours.
        names = {full: FULL, sliding: WINDOWED}
        if len(kinds) != len(layers) or not set(kinds) <= set(names):
            raise settings.refusal(
                "layer_types",
                f'it must have "{full}" or "{sliding}" for each of num_hidden_layers = '
                f"{len(layers)}",
            )
        attentions = {LAYER_ATTENTIONS: tuple(names[kind] for kind in kinds)}
        return attentions | ({WINDOW: size} if sliding in kinds else {})

    def write(config: Ours) -> dict[str, Any]:
        # No window: the key is not in our config.
        size, names = config.get(WINDOW), config[LAYER_ATTENTIONS]
        kinds = [sliding if name == WINDOWED else full for name in names]
        return {
            **({switch: size is not None} if switch else {}),
            "sliding_window": length if needed and size is None else size,
            # Without layer_types an older version reads it, which knows no other pattern.
            **({"max_window_layers": _first_of_last(kinds, sliding)} if last else {}),
            "layer_types": kinds,
        }

    return Entry(read, write)


def _told(settings: Settings, length: int | None) -> int | None:
    """Returns `sliding_window`, of which null says that there is none."""
    size = settings.get("sliding_window")
    return length if size is None and not settings.has("sliding_window") else size


def _windowed(size: int | None, num_layers: int) -> dict[str, Any]:
    """Returns keys of ours for a window of all layers, or for none."""
    if size is None:
        return {LAYER_ATTENTIONS: (FULL,) * num_layers}
    return {LAYER_ATTENTIONS: (WINDOWED,) * num_layers, WINDOW: size}


def _first_of_last(kinds: list[str], kind: str) -> int:
    """Returns the layer from which on all are of a kind."""
    first = len(kinds)
    while first and kinds[first - 1] == kind:
        first -= 1
    return first


def layers(kind: str) -> Entry:
    """Returns the entry of layers that are all of one kind of ours."""

    def read(settings: Settings) -> dict[str, Any]:
        return {BLOCKS: (kind,) * settings.number("num_hidden_layers")}

    def write(config: Ours) -> dict[str, Any]:
        return {"num_hidden_layers": len(config[BLOCKS])}

    return Entry(read, write)


def sparse_layers() -> Entry:
    """Returns the entry of layers of which every `decoder_sparse_step`-th has experts, but for
    `mlp_only_layers`.
    """

    def read(settings: Settings) -> dict[str, Any]:
        step = settings.number("decoder_sparse_step", 1)
        dense = settings.get("mlp_only_layers", [])
        kinds = []
        for layer in range(settings.number("num_hidden_layers")):
            has_experts = layer not in dense and (layer + 1) % step == 0
            kinds.append("moe" if has_experts else "dense")
        return {BLOCKS: tuple(kinds)}

    def write(config: Ours) -> dict[str, Any]:
        kinds = config[BLOCKS]
        dense = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
        return {
            "num_hidden_layers": len(kinds),
            # Every layer that is not named below has experts: that says any pattern.
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }

    return Entry(read, write)


def top_k(k: int) -> tuple[Entry, ...]:
    """Returns the entries of a router that takes the largest probabilities of all experts; `k`: how
    many where it is not told.
    """
    return (
        fixed(model__moe__router="top_k", model__moe__routers__top_k__softmax="before"),
        key("num_experts_per_tok", "model.moe.routers.top_k.k", k),
        # Of training alone.
        ignored("router_aux_loss_coef", "router_jitter_noise"),
    )


# Rows.

ENDS = (
    Row("ends/embed", "VD", "model.embed_tokens.weight", "V D"),
    Row("ends/norm_scale", "D", "model.norm.weight", "D"),
    Row("ends/head", "DV", "lm_head.weight", "V D"),
)
NORMS_BEFORE = (
    Row("norms/attention_norm_scale", "D", "input_layernorm.weight", "D"),
    Row("norms/ffn_norm_scale", "D", "post_attention_layernorm.weight", "D"),
)
NORMS_AFTER = (
    Row("norms/attention_norm_scale", "D", "post_attention_layernorm.weight", "D"),
    Row("norms/ffn_norm_scale", "D", "post_feedforward_layernorm.weight", "D"),
)
ATTENTION = (
    Row("attention/weights/q", "DHA", "self_attn.q_proj.weight", "HA D"),
    Row("attention/weights/k", "DGA", "self_attn.k_proj.weight", "GA D"),
    Row("attention/weights/v", "DGA", "self_attn.v_proj.weight", "GA D"),
    Row("attention/weights/o", "HAD", "self_attn.o_proj.weight", "D HA"),
)
ATTENTION_BIASES = (
    Row("attention/weights/q_bias", "HA", "self_attn.q_proj.bias", "HA"),
    Row("attention/weights/k_bias", "GA", "self_attn.k_proj.bias", "GA"),
    Row("attention/weights/v_bias", "GA", "self_attn.v_proj.bias", "GA"),
)
OUTPUT_BIAS = (Row("attention/weights/o_bias", "D", "self_attn.o_proj.bias", "D"),)
QK_NORMS_OF_HEADS = (
    Row("attention/weights/q_norm_scale", "A", "self_attn.q_norm.weight", "A"),
    Row("attention/weights/k_norm_scale", "A", "self_attn.k_norm.weight", "A"),
)
QK_NORMS_OF_WIDTH = (
    Row("attention/weights/q_norm_scale", "HA", "self_attn.q_norm.weight", "HA"),
    Row("attention/weights/k_norm_scale", "GA", "self_attn.k_norm.weight", "GA"),
)


def feed_forward(theirs: str) -> tuple[Row, ...]:
    """Returns the rows of a dense feed-forward, or of shared experts, below a name of theirs."""
    gate_and_up = {"P": ("gate_proj", "up_proj")}
    return (
        Row("dense/weights/w_in", "DPF", theirs + ".{P}.weight", "F D", gate_and_up),
        Row("dense/weights/w_out", "FD", theirs + ".down_proj.weight", "D F"),
    )


def experts(
    theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Row, ...]:
    """Returns the rows of a router and its experts, below a name of theirs."""
    one = theirs + ".experts.{E}"
    return (
        Row("moe/router/gate", "DE", theirs + ".gate.weight", "E D"),
        Row("moe/experts/w_in", "EDPF", one + ".{P}.weight", "F D", {"P": (gate, up)}),
        Row("moe/experts/w_out", "EFD", one + "." + down + ".weight", "D F"),
    )
