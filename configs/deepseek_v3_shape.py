"""The shape of DeepSeek-V3 (arXiv:2412.19437): 61 blocks with latent attention, of which the first
three are dense; 256 experts of which a token takes 8, and a shared one; one token more is
predicted. It has the 671.0 B parameters of the paper, and those of the further block.

    python -m moe_jax plan --config deepseek_v3_shape --topology v5p:8x8x8 --mesh 8x64x1

Named here is what is not in it: training in FP8, a pipeline of 16 unequal stages (58 repeats make
2, 29 or 58 equal ones), and the restriction of a token's experts to a few *nodes*: groups of
experts are groups of the router.
"""

from moe_jax.config import defaults


def get_config():
    c = defaults()
    c.model.vocab_size = 129_280
    c.model.d_model = 7168
    c.model.num_heads = 128
    c.model.num_kv_heads = 128
    c.model.attention = "latent"
    c.model.attentions.latent.q_lora_rank = 1536
    c.model.attentions.latent.kv_lora_rank = 512
    c.model.attentions.latent.qk_nope_head_dim = 128
    c.model.attentions.latent.qk_rope_head_dim = 64
    c.model.attentions.latent.v_head_dim = 128
    c.model.rope_pairs = "neighbours"
    c.model.prefix = ("dense", "dense", "dense")
    c.model.repeats = 58
    c.model.kinds.decoder.mtp_depths = 1
    c.model.kinds.decoder.mtp_weight = 0.3
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
