"""T5 (Raffel et al. 2019, arXiv:1910.10683), version 1.0 with ReLU and a tied head, and 1.1 with a
gated GELU: dense, without experts.

A head that is not tied reads what the last norm gives; a tied one d_model ** -0.5 of it. What newer
versions of transformers write says the latter by itself, `scale_decoder_outputs`.
"""

from typing import Any

from moe_jax.interchange import t5
from moe_jax.interchange.contract import Encoder, Family
from moe_jax.interchange.entries import Entry, Ours, key
from moe_jax.interchange.settings import Settings

# Where a config does not tell it.
D_MODEL = 512
# (is gated, name of the function in transformers) by the activations that we have.
ACTIVATIONS = {
    "relu": (False, "relu"),
    "gelu": (False, "gelu_new"),
    "geglu": (True, "gelu_new"),
    "swiglu": (True, "silu"),
}


def activation() -> Entry:
    """Returns the entry of `feed_forward_proj`, and of two keys that transformers makes of it."""

    def read(settings: Settings) -> dict[str, Any]:
        told = settings.get("feed_forward_proj", "relu")
        gate, _, name = told.rpartition("-")
        # That of T5 1.1 is the approximation by tanh, whatever its name says.
        name = "gelu_new" if told == "gated-gelu" else name
        name = settings.get("dense_act_fn", name)
        is_gated = settings.get("is_gated_act", gate == "gated")
        for ours, theirs in ACTIVATIONS.items():
            if theirs == (is_gated, name):
                return {"model.activation": ours}
        raise settings.refusal(
            "feed_forward_proj", "moe_jax reads relu, gelu_new, gated-gelu and gated-silu"
        )

    def write(config: Ours) -> dict[str, Any]:
        # Of another activation there is no name: what is written will differ in it.
        is_gated, name = ACTIVATIONS.get(config["model.activation"], (False, "relu"))
        name = "gelu" if is_gated and name == "gelu_new" else name
        return {"feed_forward_proj": f"gated-{name}" if is_gated else name}

    return Entry(read, write)


def head() -> Entry:
    """Returns the entry of the head: whether it is tied, and whether what it reads is scaled."""

    def read(settings: Settings) -> dict[str, Any]:
        tied = settings.get("tie_word_embeddings", True)
        scaled = settings.get("scale_decoder_outputs", tied)
        return {t5.TIED: tied, t5.HEAD_SCALE: t5.head_scale(settings, scaled, D_MODEL)}

    def write(config: Ours) -> dict[str, Any]:
        return {
            "tie_word_embeddings": config[t5.TIED],
            "scale_decoder_outputs": config[t5.HEAD_SCALE] != 1,
        }

    return Entry(read, write)


def layers() -> Entry:
    """Returns the entry of both stacks."""

    def read(settings: Settings) -> dict[str, Any]:
        found = t5.stacks(settings, 6, None)
        return t5.laid_out(("dense",) * found.encoder, ("dense",) * found.decoder)

    return Entry(read, t5.written_stacks)


FAMILY = Family(
    "t5",
    "T5ForConditionalGeneration",
    entries=(
        *t5.sizes(D_MODEL),
        t5.heads(8),
        key("d_ff", "model.ffn_hidden", 2048),
        activation(),
        head(),
        layers(),
    ),
    ends=t5.ENDS,
    blocks={"dense": (*t5.DECODER, *t5.feed_forward(2, "DenseReluDense"))},
    layer="decoder.block.{}.",
    encoder=Encoder(
        blocks={"dense": (*t5.ENCODER, *t5.feed_forward(1, "DenseReluDense"))},
        layer="encoder.block.{}.",
    ),
    buffers=t5.BUFFERS,
)
