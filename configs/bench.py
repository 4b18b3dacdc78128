"""The shapes that speeds are quoted for: vocabulary 4096, d_model 256, 4 blocks, 8 heads, SwiGLU
experts of 512, top-2, 8 x 256 tokens.

    python -m moe_jax bench --config bench --what train --what decode --what layer --what start
    python -m moe_jax bench --config bench --rivals

Variants: dense (the same active feed-forward, hidden 1024), e8 and e64 (experts, dropless),
e8_capacity and e64_capacity (with the dispatcher that drops). All of them, which `bench` takes
where none is named, are timed against dense: about three minutes on two CPU cores, and 10 GB of
memory (16 GB with rivals).
"""

from moe_jax.config import defaults

VARIANTS = ("dense", "e8", "e8_capacity", "e64", "e64_capacity")


def get_config(variant="dense"):
    c = defaults()
    c.model.vocab_size = 4096
    c.model.d_model = 256
    c.model.num_heads = 8
    c.model.num_kv_heads = 8
    c.model.ffn_hidden = 1024
    c.model.moe.expert_hidden = 512
    c.train.batch_size = 8
    if variant == "dense":
        c.model.period = ("dense",)
        return c
    experts, _, dispatcher = variant.partition("_")
    c.model.moe.num_experts = int(experts.removeprefix("e"))
    if dispatcher:
        c.model.moe.dispatcher = dispatcher
    return c
