"""Images by a small V-MoE: patches, an MoE encoder with batch-priority routing, mean pooling.

    python -m moe_jax.main --config configs/vision.py --workdir runs/digits
"""

from configs import base


def get_config(arg=None):
    c = base.get_config(arg)
    c.task = "vision"
    c.model.kind = "encoder"
    c.model.kinds.encoder.inputs = "vectors"
    c.model.kinds.encoder.input_dim = 4
    c.model.kinds.encoder.num_classes = 10
    c.model.kinds.encoder.learned_positions = 16
    c.model.d_model = 64
    c.model.moe.num_experts = 4
    c.model.moe.expert_hidden = 128
    c.model.moe.ordering = "batch_priority"
    c.model.moe.dispatcher = "capacity"
    c.model.prefix = ("dense",)
    c.model.period = ("moe",)
    c.model.repeats = 2
    c.model.ffn_hidden = 256
    c.data.seq_len = 16
    c.data.heldout_every = 5
    c.tasks.vision.copies = 8
    c.train.batch_size = 64
    c.train.steps = 400
    c.optim.learning_rate = 2e-3
    c.eval.every = 200
    c.eval.batch_size = 256
    c.eval.sample_tokens = 0
    return c
