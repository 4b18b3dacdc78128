"""OLMoE 1B-7B (Muennighoff et al. 2024, arXiv:2409.02060): 6.9 B parameters, of which a token uses
1.3 B.

    python -m moe_jax plan --config olmoe_1b7b --topology v5p:2x4x4 --mesh 4x8x1

Sizes, batch, losses and learning rate are those of the paper (its appendix B); our balance loss
counts as the paper's does, over micro-batches of all devices where theirs are of one. docs/plan.md
has its plans.
"""

from moe_jax.config import defaults


def get_config():
    c = defaults()
    c.model.vocab_size = 50_304
    c.model.d_model = 2048
    c.model.num_heads = 16
    c.model.num_kv_heads = 16
    c.model.qk_norm = True
    c.model.qk_norm_over = "width"
    c.model.norm_epsilon = 1e-5
    c.model.repeats = 16
    c.model.moe.num_experts = 64
    c.model.moe.expert_hidden = 1024
    c.model.moe.routers.top_k.k = 8
    c.model.moe.routers.top_k.renormalize = False
    c.model.moe.dispatchers.dropless.buffer = 1.25
    # Of every micro-batch: that of the global batch costs one more forward pass (docs/balance.md).
    c.model.moe.losses.balance = 0.0
    c.model.moe.losses.micro_batch_balance = 0.01
    c.model.moe.losses.z = 0.001
    c.model.dtype = "bfloat16"
    c.model.scan = True
    c.model.remat = "attention+experts"
    c.data.seq_len = 4096
    c.train.batch_size = 1024
    c.train.micro_batch_size = 256
    # 5.1 T tokens.
    c.train.steps = 1_220_000
    c.optim.learning_rate = 4e-4
    c.optim.warmup_steps = 2500
    c.eval.batch_size = 256
    return c
