"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786), dense, its models of text: norms before and after,
heads of queries and keys normalised, a window in all layers but every sixth.

Layers with a window have a rotary base of their own, and no scaling. Refused: a cap on scores,
which transformers takes and does not apply.
"""

from typing import Any

from moe_jax.interchange import decoder, gemma
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import Entry, Ours, fixed, only
from moe_jax.interchange.rotary import rope
from moe_jax.interchange.settings import Settings
from moe_jax.models.rope_scalings import UNSCALED

# Of all layers, and of those with a window.
THETA, LOCAL_THETA = 1e6, 1e4
# Of so many layers the last one has no window.
PATTERN = 6
AT, SCALING = "model.attentions.sliding_window", "model.rope_scaling"


def layers() -> Entry:
    """Returns the entry of the windows and rotary frequencies of all layers."""
    turned = rope(theta=THETA)

    def windows(every: int) -> Entry:
        def slides(layer: int, max_window_layers: int) -> bool:
            del max_window_layers
            return (layer + 1) % every != 0

        return decoder.window_by_layer(slides, last=0, switch="", needed=True)

    def read(settings: Settings) -> dict[str, Any]:
        # Transformers 5 writes it under this name, too, beside layer_types.
        settings.get("_sliding_window_pattern")
        ours = windows(settings.number("sliding_window_pattern", PATTERN)).read(settings)
        theta, settings = local_base(settings)
        ours |= turned.read(settings)
        if decoder.WINDOW not in ours:
            return ours
        # 0 stands for that of the model.
        ours[f"{AT}.rope_theta"] = 0.0 if theta == ours["model.rope_theta"] else theta
        if ours.get(SCALING, UNSCALED) != UNSCALED:
            ours[f"{AT}.rope_scaled"] = False
        return ours

    def write(config: Ours) -> dict[str, Any]:
        theta = config.get(f"{AT}.rope_theta") or config["model.rope_theta"]
        theirs = windows(PATTERN).write(config) | turned.write(config)
        return theirs | {"rope_local_base_freq": theta}

    return Entry(read, write)


def local_base(settings: Settings) -> tuple[float, Settings]:
    """Returns (the base of layers with a window, the settings as `rope` reads those of the others).

    Transformers 5 writes `rope_parameters` of both kinds of layers; before there was
    `rope_local_base_freq`.
    """
    theta = settings.get("rope_local_base_freq", LOCAL_THETA)
    if settings.get("rope_parameters") is None:
        return theta, settings
    both = settings.inner("rope_parameters")
    of_others = both.need("full_attention")
    if both.get("sliding_attention") is not None:
        local = both.inner("sliding_attention")
        if local.get("rope_type", "default") != "default":
            raise local.refusal("rope_type", "moe_jax has no scaling of layers with a window alone")
        theta = local.get("rope_theta", theta)
        local.refuse_unread("gemma3_text")
    both.refuse_unread("gemma3_text")
    return theta, settings.with_values(rope_parameters=of_others)


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    entries=(
        *gemma.shared(activation="hidden_activation"),
        fixed(model__norm_position="both", model__qk_norm=True, model__qk_norm_over="head"),
        gemma.scores(),
        only("attn_logit_softcapping", None, "cap on the scores of Gemma 3"),
        gemma.cap("final_logit_softcapping", "model.logit_cap", default=0.0),
        layers(),
    ),
    ends=decoder.ENDS,
    blocks={
        "dense": (
            *gemma.NORMS_OF_BOTH,
            *gemma.ATTENTION,
            *decoder.QK_NORMS_OF_HEADS,
            *decoder.feed_forward("mlp"),
        )
    },
)
