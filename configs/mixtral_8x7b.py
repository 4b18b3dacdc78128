"""Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088): 46.7 B parameters, of which a token uses
12.9 B.

    python -m moe_jax plan --config mixtral_8x7b --topology v5p:4x4x4 --mesh 8x8x1

Sizes are those of the published model. What the paper does not tell is ours: rows of 4096 tokens, a
batch of 4 million, the learning rate. It needs many accelerators; docs/plan.md has its plans.
"""

from moe_jax.config import defaults


def get_config():
    c = defaults()
    c.model.vocab_size = 32_000
    c.model.d_model = 4096
    c.model.num_heads = 32
    c.model.num_kv_heads = 8
    c.model.rope_theta = 1e6
    c.model.norm_epsilon = 1e-5
    c.model.repeats = 32
    c.model.moe.expert_hidden = 14_336
    c.model.moe.dispatchers.dropless.buffer = 1.25
    # Of every micro-batch: that of the global batch costs one more forward pass (docs/balance.md).
    c.model.moe.losses.balance = 0.0
    c.model.moe.losses.micro_batch_balance = 0.02
    c.model.dtype = "bfloat16"
    c.model.scan = True
    c.model.remat = "attention+experts"
    c.data.seq_len = 4096
    c.train.batch_size = 1024
    c.train.micro_batch_size = 128
    c.train.steps = 100_000
    c.optim.learning_rate = 3e-4
    c.optim.warmup_steps = 2000
    c.eval.batch_size = 128
    return c
