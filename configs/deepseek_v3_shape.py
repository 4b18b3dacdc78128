"""The shape of DeepSeek-V3 (arXiv:2412.19437): 256 experts of which a token takes 8, one shared,
three dense blocks before; 674.8 B parameters instead of 671.0 B.

    python -m moe_jax plan --config deepseek_v3_shape --topology v5p:8x8x8 --mesh 8x64x1

What our options cannot express yet is named here, and is not in the plan:

- multi-head latent attention. In its place stand 128 heads of grouped-query attention with 8 key
  heads: 62.5 M parameters a layer more;
- the multi-token prediction module, which is beside the 671 B;
- training in FP8, and a pipeline of 16 unequal stages: 58 repeats make 2, 29 or 58 equal ones;
- restriction of a token's experts to a few *nodes*: groups of experts are groups of the router.
"""

from moe_jax.config import defaults


def get_config():
    c = defaults()
    c.model.vocab_size = 129_280
    c.model.d_model = 7168
    c.model.num_heads = 128
    c.model.num_kv_heads = 8
    c.model.head_dim = 128
    c.model.prefix = ("dense", "dense", "dense")
    c.model.repeats = 58
    c.model.ffn_hidden = 18_432
    c.model.moe.num_experts = 256
    c.model.moe.expert_hidden = 2048
    c.model.moe.shared_experts = 1
    c.model.moe.router = "sigmoid"
    c.model.moe.routers.sigmoid.k = 8
    c.model.moe.routers.sigmoid.scale = 2.5
    c.model.moe.routers.sigmoid.num_groups = 8
    c.model.moe.routers.sigmoid.top_groups = 4
    c.model.moe.dispatchers.dropless.buffer = 1.25
    c.model.moe.losses.sequence_balance = 1e-4
    c.model.dtype = "bfloat16"
    c.model.scan = True
    c.model.remat = "full"
    c.data.seq_len = 4096
    c.train.batch_size = 15_360
    c.train.micro_batch_size = 1024
    c.train.steps = 235_000
    c.optim.learning_rate = 2.2e-4
    c.optim.warmup_steps = 2000
    c.eval.batch_size = 1024
    return c
