"""gpt-oss (OpenAI 2025, arXiv:2508.10925): experts with biases and a clamped SwiGLU in every layer,
a router with a bias, attention sinks, and a window in every other layer.

The released checkpoints hold the experts in MXFP4 (mxfp4.py), which are read as bfloat16; an export
is not quantised.
"""

from moe_jax.interchange import decoder, mxfp4
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, ignored, key
from moe_jax.interchange.rotary import rope
from moe_jax.interchange.rows import Row

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
ACTIVATION = "model.activations.clamped_swiglu"


FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-5, activation="clamped_swiglu"),
        key("swiglu_alpha", f"{ACTIVATION}.alpha", 1.702),
        key("swiglu_limit", f"{ACTIVATION}.limit", 7.0),
        decoder.heads(head_dim=64),
        decoder.biases_of_all(default=True),
        fixed(model__attention_sinks=True),
        decoder.window_by_layer(
            decoder.every_other_layer, last=0, length=128, switch="", needed=True
        ),
        rope(theta=150_000.0, untold=YARN),
        decoder.layers("moe"),
        *decoder.top_k(k=4),
        fixed(
            model__moe__routers__top_k__renormalize=True,
            model__moe__routers__top_k__bias=True,
            model__moe__expert_bias=True,
        ),
        key("num_local_experts", "model.moe.num_experts", 128, also="num_experts"),
        key("intermediate_size", "model.moe.expert_hidden", 2880),
        # Said a second time, for the code that the model was released with.
        ignored("experts_per_token", "initial_context_length"),
        mxfp4.entry(),
    ),
    ends=decoder.ENDS,
    blocks={
        "moe": (
            *decoder.NORMS_BEFORE,
            *decoder.ATTENTION,
            *decoder.ATTENTION_BIASES,
            *decoder.OUTPUT_BIAS,
            Row("attention/weights/sinks", "H", "self_attn.sinks", "H"),
            Row("moe/router/gate", "DE", "mlp.router.weight", "E D"),
            Row("moe/router/gate_bias", "E", "mlp.router.bias", "E"),
            # Gate and up of a hidden unit stand side by side.
            Row("moe/experts/w_in", "EDPF", "mlp.experts.gate_up_proj", "E D FP"),
            Row("moe/experts/in_bias", "EPF", "mlp.experts.gate_up_proj_bias", "E FP"),
            Row("moe/experts/w_out", "EFD", "mlp.experts.down_proj", "E F D"),
            Row("moe/experts/out_bias", "ED", "mlp.experts.down_proj_bias", "E D"),
        )
    },
    quantized=mxfp4.unpacked,
)
