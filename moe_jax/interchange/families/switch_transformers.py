"""Switch Transformers (Fedus et al. 2021, arXiv:2101.03961): T5 with experts in some layers, of
which a token takes one, times its probability.

An expert has `expert_capacity` places in each row, and what finds none is dropped, at evaluation as
well. Where that is no less than UNBOUNDED nothing drops. In transformers padding takes places too,
and here it does not: both are the same for rows whose padding is at their end.
"""

from typing import Any

from moe_jax.interchange import t5
from moe_jax.interchange.contract import Encoder, Family
from moe_jax.interchange.entries import Entry, Ours, fixed, ignored, key, only
from moe_jax.interchange.meaning import BLOCKS, ENCODER_BLOCKS
from moe_jax.interchange.rows import Row
from moe_jax.interchange.settings import Settings

PLACES = "model.moe.dispatchers.capacity.places"
UNBOUNDED = 2**31 - 1
# Where a config does not tell it.
D_MODEL = 768
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu"}


def capacity() -> Entry:
    """Returns the entry of `expert_capacity`."""

    def read(settings: Settings) -> dict[str, Any]:
        places = settings.number("expert_capacity", 64)
        if places >= UNBOUNDED:
            return {}
        return {"model.moe.dispatcher": "capacity", PLACES: places}

    def write(config: Ours) -> dict[str, Any]:
        return {"expert_capacity": config.get(PLACES, UNBOUNDED)}

    return Entry(read, write)


def hidden() -> Entry:
    """Returns the entry of `d_ff`, the hidden width of dense layers and of experts alike."""

    def read(settings: Settings) -> dict[str, Any]:
        width = settings.number("d_ff", 2048)
        return {"model.ffn_hidden": width, "model.moe.expert_hidden": width}

    def write(config: Ours) -> dict[str, Any]:
        of_experts = config.get("model.moe.expert_hidden")
        return {"d_ff": config.get("model.ffn_hidden", of_experts)}

    return Entry(read, write)


def activation() -> Entry:
    """Returns the entry of `dense_act_fn`."""

    def read(settings: Settings) -> dict[str, Any]:
        name = settings.get("dense_act_fn", "relu")
        if name not in ACTIVATIONS:
            raise settings.refusal("dense_act_fn", f"moe_jax reads {' and '.join(ACTIVATIONS)}")
        return {"model.activation": ACTIVATIONS[name]}

    def write(config: Ours) -> dict[str, Any]:
        names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        # Of another activation there is no name: what is written will differ in it.
        return {"dense_act_fn": names.get(config["model.activation"], "relu")}

    return Entry(read, write)


def head() -> Entry:
    """Returns the entry of the head, which is tied and reads the last norm scaled."""

    def read(settings: Settings) -> dict[str, Any]:
        if not settings.get("tie_word_embeddings", True):
            raise settings.refusal(
                "tie_word_embeddings",
                "transformers then has other embeddings in the encoder than in the decoder, and "
                "moe_jax has one of both",
            )
        return {t5.TIED: True, t5.HEAD_SCALE: t5.head_scale(settings, True, D_MODEL)}

    def write(config: Ours) -> dict[str, Any]:
        del config
        return {"tie_word_embeddings": True}

    return Entry(read, write)


def by_step(step: int, number: int) -> tuple[str, ...]:
    """Returns the kinds of a stack of which every step-th block has experts, from the second on;
    0 = none has.
    """
    sparse = [step == 1 or (step > 0 and layer % step == 1) for layer in range(number)]
    return tuple("moe" if one else "dense" for one in sparse)


def layers() -> Entry:
    """Returns the entry of both stacks.

    transformers makes `encoder_sparse_step` of `num_sparse_encoder_layers`, and takes it as it is
    where a config says it.
    """

    def kinds(settings: Settings, stack: str, number: int) -> tuple[str, ...]:
        num_sparse = settings.get(f"num_sparse_{stack}_layers", 3)
        step = number // num_sparse if num_sparse else number
        return by_step(settings.get(f"{stack}_sparse_step", step), number)

    def read(settings: Settings) -> dict[str, Any]:
        found = t5.stacks(settings, 12, 12)
        encoder = kinds(settings, "encoder", found.encoder)
        return t5.laid_out(encoder, kinds(settings, "decoder", found.decoder))

    def write(config: Ours) -> dict[str, Any]:
        theirs = t5.written_stacks(config)
        for stack, name in (("encoder", ENCODER_BLOCKS), ("decoder", BLOCKS)):
            blocks = config.get(name, ())
            steps = range(len(blocks) + 1)
            # Without one that fits, what is written will differ in the blocks.
            fitting = [step for step in steps if by_step(step, len(blocks)) == blocks]
            theirs[f"{stack}_sparse_step"] = fitting[0] if fitting else 0
            theirs[f"num_sparse_{stack}_layers"] = blocks.count("moe")
        return theirs

    return Entry(read, write)


def experts(layer: int) -> tuple[Row, ...]:
    """Returns the rows of a router, its experts and the norm before them."""
    before = f"layer.{layer}.mlp."
    one = before + "experts.expert_{E}."
    return (
        Row("norms/ffn_norm_scale", "D", f"layer.{layer}.layer_norm.weight", "D"),
        Row("moe/router/gate", "DE", before + "router.classifier.weight", "E D"),
        Row("moe/router/gate_bias", "E", before + "router.classifier.bias", "E"),
        Row("moe/experts/w_in", "EDPF", one + "wi.weight", "PF D"),
        Row("moe/experts/w_out", "EFD", one + "wo.weight", "D F"),
    )


FAMILY = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    entries=(
        *t5.sizes(D_MODEL),
        t5.heads(12),
        hidden(),
        activation(),
        head(),
        layers(),
        fixed(model__moe__router="switch"),
        key("num_experts", "model.moe.num_experts", 8),
        key("router_bias", "model.moe.routers.switch.bias", False),
        only("router_dtype", "float32", "router in another precision than float32 or wider"),
        capacity(),
        # Of training alone, or read by nothing in transformers.
        ignored("router_jitter_noise", "router_z_loss_coef", "router_aux_loss_coef"),
        ignored("router_ignore_padding_tokens", "add_router_probs"),
        ignored("feed_forward_proj", "is_gated_act"),
    ),
    ends=t5.ENDS,
    blocks={
        "dense": (*t5.DECODER, *t5.feed_forward(2, "mlp")),
        "moe": (*t5.DECODER, *experts(2)),
    },
    layer="decoder.block.{}.",
    encoder=Encoder(
        blocks={
            "dense": (*t5.ENCODER, *t5.feed_forward(1, "mlp")),
            "moe": (*t5.ENCODER, *experts(1)),
        },
        layer="encoder.block.{}.",
    ),
    buffers=t5.BUFFERS,
)
