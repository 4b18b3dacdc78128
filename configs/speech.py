"""Spoken digits: log-mel frames, an MoE encoder, mean pooling.

    python -m moe_jax.main --config configs/speech.py --config.data.folder=DATA \
        --workdir runs/speech

The one variant is fsdd, the Free Spoken Digit Dataset; its own test part is the recordings 0 to 4
of each digit and speaker.
"""

from moe_jax.config import defaults

DATASETS = {"fsdd": "fsdd"}
VARIANTS = tuple(DATASETS)


def get_config(arg="fsdd"):
    c = defaults()
    c.task = "speech"
    c.tasks.speech.dataset = DATASETS[arg]
    c.tasks.speech.copies = 6
    c.tasks.speech.tempo = 0.15
    c.model.kind = "encoder"
    c.model.kinds.encoder.inputs = "vectors"
    c.model.kinds.encoder.input_dim = 160
    c.model.kinds.encoder.num_classes = 10
    c.model.kinds.encoder.head_dropout = 0.2
    c.model.d_model = 64
    c.model.dropout = 0.1
    c.model.prefix = ("dense",)
    c.model.ffn_hidden = 128
    c.model.repeats = 1
    c.model.moe.num_experts = 8  # as many as the devices of the largest mesh that `verify` tries
    c.model.moe.expert_hidden = 64
    c.model.moe.routers.top_k.k = 4
    c.data.seq_len = 24
    c.train.steps = 900
    c.train.batch_size = 32
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 50
    c.optim.ema_decay = 0.99
    c.eval.every = 300
    c.eval.batch_size = 64
    c.eval.sample_tokens = 0
    c.log.every = 50
    c.log.histogram_every = 200
    return c
