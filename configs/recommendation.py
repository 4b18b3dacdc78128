"""Recommendation by a multi-gate mixture of experts: which packages a Debian package will depend on, given four in five of them.

    python -m moe_jax.main --config configs/recommendation.py --config.data.folder=DATA --workdir runs/recommendation

Two tasks with a gate and a tower each, libraries and all other packages; 3,169 items. The end shows popularity and item-kNN beside it.
"""

from configs import base


def get_config(arg=None):
    c = base.get_config(arg)
    c.task = "recommendation"
    c.model.kind = "mmoe"
    c.model.kinds.mmoe.items = (2057, 1112)
    c.model.kinds.mmoe.item_dropout = 0.5
    c.model.vocab_size = 3200
    c.model.d_model = 128
    c.model.repeats = 1
    c.model.dropout = 0.2
    c.model.moe.expert_hidden = 128
    c.model.moe.router = "multi_gate"
    c.data.seq_len = 64
    c.data.heldout_every = 10
    c.train.steps = 2000
    c.train.batch_size = 128
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 100
    c.optim.ema_decay = 0.99
    c.eval.every = 500
    c.eval.batch_size = 128
    c.eval.sample_tokens = 0
    c.log.every = 50
    c.log.histogram_every = 200
    return c
