"""Images by a small V-MoE (Riquelme et al.

2021): patches, an MoE encoder with batch-priority routing and capacity, mean pooling.

    python -m moe_jax.main --config configs/vision.py --workdir runs/digits
    python -m moe_jax.main --config configs/vision.py:fashion_mnist --workdir runs/fashion_mnist

The variant names the data: digits (scikit-learn, nothing to download) or fashion_mnist (its files
in data.folder, or Debian's package dataset-fashion-mnist). The end shows logistic regression and
nearest neighbours beside the model.
"""

from moe_jax.config import defaults

# Of each set: side of a patch, number of patches, copies of each image, steps, rows of a step,
# every n-th image held out.
SETS = {"digits": (2, 16, 8, 900, 64, 5), "fashion_mnist": (4, 49, 3, 3600, 64, 5)}
VARIANTS = tuple(SETS)


def get_config(arg="digits"):
    c = defaults()
    patch, number, copies, steps, rows, heldout_every = SETS[arg]
    c.task = "vision"
    c.tasks.vision.dataset = arg
    c.tasks.vision.patch = patch
    c.tasks.vision.copies = copies
    c.tasks.vision.flip = arg == "fashion_mnist"
    c.model.kind = "encoder"
    c.model.kinds.encoder.inputs = "vectors"
    c.model.kinds.encoder.input_dim = patch * patch
    c.model.kinds.encoder.num_classes = 10
    c.model.kinds.encoder.learned_positions = number
    c.model.d_model = 64
    c.model.prefix = ("dense",)
    c.model.ffn_hidden = 128
    c.model.repeats = 1
    c.model.moe.expert_hidden = 128
    c.model.moe.ordering = "batch_priority"
    c.model.moe.dispatcher = "capacity"
    c.data.seq_len = number
    c.data.heldout_every = heldout_every
    c.train.steps = steps
    c.train.batch_size = rows
    c.optim.optimizer = "muon"
    c.optim.learning_rate = 4e-3
    c.optim.warmup_steps = 50
    c.optim.ema_decay = 0.99
    c.eval.every = steps // 3
    c.eval.batch_size = 256
    c.eval.sample_tokens = 0
    c.log.every = 50
    c.log.histogram_every = 200
    return c
