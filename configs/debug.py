"""The smallest run that exercises everything: eight simulated devices, a mesh of 2 x 2 x 2,
accumulation, evaluation, checkpoints.

    python -m moe_jax.main --config configs/debug.py --workdir runs/debug

Half a minute on two CPU cores, most of it compilation. The loss falls a little; nothing is learned.
"""

from moe_jax.config import defaults


def get_config():
    c = defaults()
    c.simulate_devices = 8
    c.mesh.expert = 2
    c.mesh.model = 2
    c.model.d_model = 32
    c.model.ffn_hidden = 64
    c.model.num_kv_heads = 2
    c.model.qk_norm = True
    c.model.prefix = ("dense",)
    c.model.repeats = 2
    c.model.scan = True
    c.model.remat = "dispatch"
    c.model.moe.expert_hidden = 32
    c.model.moe.shared_experts = 1
    c.train.steps = 8
    c.train.batch_size = 16
    c.train.micro_batch_size = 8
    c.optim.warmup_steps = 2
    c.optim.ema_decay = 0.9
    c.data.sources = (("embedded:verse,novel", 1.0),)
    c.data.slice_bytes = 20_000
    c.data.seq_len = 32
    c.eval.every = 4
    c.eval.batches = 2
    c.eval.final_batches = 4
    c.eval.sample_tokens = 16
    c.checkpoint.every = 4
    c.log.every = 2
    c.log.histogram_every = 4
    return c
