"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118), dense: norms before and after, soft caps on scores
and on logits, a window in every other layer.
"""

from moe_jax.interchange import decoder, gemma
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, ignored
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    entries=(
        *gemma.shared(activation="hidden_activation"),
        fixed(model__norm_position="both"),
        gemma.scores(),
        gemma.cap("attn_logit_softcapping", "model.attention_cap", default=50.0),
        gemma.cap("final_logit_softcapping", "model.logit_cap", default=30.0),
        decoder.window_by_layer(decoder.every_other_layer, last=0, switch="", needed=True),
        # The window a second time, in some configs, where transformers does not read it.
        ignored("sliding_window_size"),
        rope(theta=1e4),
    ),
    ends=decoder.ENDS,
    blocks={"dense": (*gemma.NORMS_OF_BOTH, *gemma.ATTENTION, *decoder.feed_forward("mlp"))},
)
