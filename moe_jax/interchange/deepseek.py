"""What DeepSeek's families and their descendants share: latent attention, dense first layers,
shared experts.

Axes of rows: D model, H heads, A width of a head, Q and R ranks of latents; decoder.py has the
others.
"""

from typing import Any

from moe_jax.interchange import decoder
from moe_jax.interchange.entries import Entry, Ours, fixed, ignored, key, only
from moe_jax.interchange.meaning import BLOCKS, LAYER_ATTENTIONS
from moe_jax.interchange.rotary import PLACES, rope
from moe_jax.interchange.rows import Row
from moe_jax.interchange.settings import Settings

SHARED, HIDDEN = "model.moe.shared_experts", "model.moe.shared_hidden"
LATENT, AT = "latent", "model.attentions.latent"
ROUTER = "model.moe.routers.sigmoid"
BIAS = "moe/state/bias"


def first_dense(default: int = 0) -> Entry:
    """Returns the entry of layers of which the first `first_k_dense_replace` have no experts."""

    def read(settings: Settings) -> dict[str, Any]:
        num_layers = settings.number("num_hidden_layers")
        num_dense = min(settings.get("first_k_dense_replace", default), num_layers)
        return {BLOCKS: ("dense",) * num_dense + ("moe",) * (num_layers - num_dense)}

    def write(config: Ours) -> dict[str, Any]:
        kinds = config[BLOCKS]
        # Those before the first one with experts; other patterns are found when it is read again.
        num_dense = next((i for i, kind in enumerate(kinds) if kind == "moe"), len(kinds))
        return {"num_hidden_layers": len(kinds), "first_k_dense_replace": num_dense}

    return Entry(read, write)


def shared(default: int = 1) -> Entry:
    """Returns the entry of shared experts: at least one, each as wide as a routed one."""

    def read(settings: Settings) -> dict[str, Any]:
        number = settings.number("n_shared_experts", default)
        # n shared experts of a width are one of n times the width.
        return {SHARED: 1, HIDDEN: number * settings.number("moe_intermediate_size")}

    def write(config: Ours) -> dict[str, Any]:
        # A model without experts has no width of them, and must name one.
        width = config.get("model.moe.expert_hidden", 1)
        number = max(config.get(HIDDEN, 0) // width, 1)
        return {"n_shared_experts": number, "moe_intermediate_size": width}

    return Entry(read, write)


def latent_attention() -> tuple[Entry, ...]:
    """Returns the entries of latent attention in every layer, with its rotary embedding."""
    return (
        _heads(),
        _q_lora_rank(),
        key("kv_lora_rank", f"{AT}.kv_lora_rank", 512),
        key("qk_nope_head_dim", f"{AT}.qk_nope_head_dim", 128),
        key("qk_rope_head_dim", f"{AT}.qk_rope_head_dim", 64),
        key("v_head_dim", f"{AT}.v_head_dim", 128),
        # Theirs is a constant, whatever rms_norm_eps is.
        fixed(model__attentions__latent__norm_epsilon=1e-6),
        # Sums of those above.
        ignored("head_dim", "qk_head_dim"),
        decoder.biases_of_all(),
        _rope(theta=1e4),
        # How experts lay on devices, how their matrix products were cut, and losses of training.
        ignored("ep_size", "pretraining_tp", "aux_loss_alpha", "seq_aux"),
        only("moe_layer_freq", 1, "other layers without experts than the first"),
    )


def _heads() -> Entry:
    """Returns the entry of the heads, of which each has its own keys."""

    def read(settings: Settings) -> dict[str, Any]:
        num_heads = settings.number("num_attention_heads")
        if settings.number("num_key_value_heads", num_heads) != num_heads:
            raise settings.refusal(
                "num_key_value_heads", f"it must be num_attention_heads = {num_heads}"
            )
        return {
            "model.num_heads": num_heads,
            "model.num_kv_heads": num_heads,
            # As where it is not told: it says nothing of latent attention.
            "model.head_dim": max(settings.number("hidden_size") // num_heads, 1),
            LAYER_ATTENTIONS: (LATENT,) * settings.number("num_hidden_layers"),
        }

    def write(config: Ours) -> dict[str, Any]:
        num_heads = config["model.num_heads"]
        return {"num_attention_heads": num_heads, "num_key_value_heads": num_heads}

    return Entry(read, write)


def _q_lora_rank(default: int = 1536) -> Entry:
    """Returns the entry of the rank of the latent of queries; null says that there is none."""

    def read(settings: Settings) -> dict[str, Any]:
        rank = settings.get("q_lora_rank")
        # null, and a key that is not there, mean different things.
        untold = 0 if settings.has("q_lora_rank") else default
        return {f"{AT}.q_lora_rank": untold if rank is None else rank}

    def write(config: Ours) -> dict[str, Any]:
        return {"q_lora_rank": config.get(f"{AT}.q_lora_rank") or None}

    return Entry(read, write)


def _rope(theta: float) -> Entry:
    """Returns the entry of the rotary embedding, whose scaling may sharpen the scores."""
    inner, scale = rope(theta), "mscale_all_dim"

    def read(settings: Settings) -> dict[str, Any]:
        ours = inner.read(settings)
        # The scaling stands under one of several names, by the version that wrote it.
        place = next((name for name in PLACES if settings.get(name)), "")
        mscale = settings.inner(place).get(scale, 0.0) if place else 0.0
        scaled = ours.get("model.rope_scaling", "none") != "none"
        return ours | {f"{AT}.mscale": float(mscale) if scaled else 0.0}

    def write(config: Ours) -> dict[str, Any]:
        theirs, mscale = inner.write(config), config.get(f"{AT}.mscale")
        if mscale and theirs["rope_scaling"]:
            theirs["rope_scaling"] |= {scale: mscale}
        return theirs

    return Entry(read, write)


LATENT_ATTENTION = (
    Row("attention/weights/q", "DHA", "self_attn.q_proj.weight", "HA D"),
    Row("attention/weights/q_a", "DQ", "self_attn.q_a_proj.weight", "Q D"),
    Row("attention/weights/q_a_bias", "Q", "self_attn.q_a_proj.bias", "Q"),
    Row("attention/weights/q_a_norm_scale", "Q", "self_attn.q_a_layernorm.weight", "Q"),
    Row("attention/weights/q_b", "QHA", "self_attn.q_b_proj.weight", "HA Q"),
    Row("attention/weights/kv_a", "DR", "self_attn.kv_a_proj_with_mqa.weight", "R D"),
    Row("attention/weights/kv_a_bias", "R", "self_attn.kv_a_proj_with_mqa.bias", "R"),
    Row("attention/weights/kv_a_norm_scale", "R", "self_attn.kv_a_layernorm.weight", "R"),
    Row("attention/weights/kv_b", "RHA", "self_attn.kv_b_proj.weight", "HA R"),
    Row("attention/weights/o", "HAD", "self_attn.o_proj.weight", "D HA"),
    *decoder.OUTPUT_BIAS,
)
# Transformers keeps routers in float32.
WIDE = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
CORRECTION = (Row(BIAS, "E", "mlp.gate.e_score_correction_bias", "E"),)
# Layers that predict further tokens (further.py); P = 2, the embedding and the hidden state.
JOINS = (
    Row("embed_norm_scale", "D", "enorm.weight", "D"),
    Row("hidden_norm_scale", "D", "hnorm.weight", "D"),
    Row("w_join", "PED", "eh_proj.weight", "D PE"),
    Row("out_norm_scale", "D", "shared_head.norm.weight", "D"),
)
COPIES = (
    Row("ends/embed", "VD", "embed_tokens.weight", "V D"),
    Row("ends/head", "DV", "shared_head.head.weight", "V D"),
)


def blocks(attention: tuple[Row, ...], router: tuple[Row, ...]) -> dict[str, tuple[Row, ...]]:
    """Returns the rows of both kinds of blocks; `router`: what it has beside a gate."""
    before = (*decoder.NORMS_BEFORE, *attention)
    shared_experts = decoder.feed_forward("mlp.shared_experts")
    return {
        "moe": (*before, *decoder.experts("mlp"), *router, *shared_experts),
        "dense": (*before, *decoder.feed_forward("mlp")),
    }
