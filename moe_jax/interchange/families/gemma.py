"""Gemma (Gemma Team 2024, arXiv:2403.08295), dense."""

from moe_jax.interchange import decoder, gemma
from moe_jax.interchange.contract import Family
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "gemma",
    "GemmaForCausalLM",
    entries=(*gemma.shared(activation="hidden_act"), rope(theta=1e4)),
    ends=decoder.ENDS,
    blocks={"dense": (*decoder.NORMS_BEFORE, *gemma.ATTENTION, *decoder.feed_forward("mlp"))},
)
