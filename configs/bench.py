"""The shapes that speeds are quoted for: vocabulary 4096, d_model 256, 4 blocks, 8 heads, SwiGLU
experts of 512, top-2, 8 x 256 tokens.

    python -m moe_jax bench --config bench \
        --variant 'dense: --config.model.period=dense' \
        --variant e8: \
        --variant 'e8 capacity: --config.model.moe.dispatcher=capacity' \
        --variant 'e64: --config.model.moe.num_experts=64' \
        --variant "e64 capacity: --config.model.moe.num_experts=64 \
        --config.model.moe.dispatcher=capacity"

The dense model has the same active feed-forward (hidden 1024). About a minute and a half on two CPU
cores.
"""

from moe_jax.config import defaults


def get_config():
    c = defaults()
    c.model.vocab_size = 4096
    c.model.d_model = 256
    c.model.num_heads = 8
    c.model.num_kv_heads = 8
    c.model.ffn_hidden = 1024
    c.model.moe.expert_hidden = 512
    c.train.batch_size = 8
    return c
