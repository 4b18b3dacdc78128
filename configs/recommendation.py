"""Recommendation by a multi-gate mixture of experts: which items a user will take, given four in
five of them.

    python -m moe_jax.main --config configs/recommendation.py --config.data.folder=DATA \
        --workdir runs/recommendation
    python -m moe_jax.main --config configs/recommendation.py:movielens --workdir runs/movielens

The variant names the data, of two tasks with a gate and a tower each: debian (which packages a
Debian package will depend on; libraries and all other packages, 3,169 items; the default), or
movielens (TFDS's movielens/1m-ratings; the 500 movies that most users gave four stars or more, and
the 2,000 that come next; others are left out). The end shows popularity and item-kNN beside the
model.
"""

from moe_jax.config import defaults

# Of each set: its name, items of each task, size of the table, places of a row. A user of movielens
# rated 2,314 movies, the most of all:
# were all liked, 463 of them would be to be found.
SETS = {
    "debian": ("debian_depends", (2057, 1112), 3200, 64),
    "movielens": ("tfds:movielens/1m-ratings", (500, 2000), 2560, 512),
}
VARIANTS = tuple(SETS)


def get_config(arg="debian"):
    c = defaults()
    name, items, vocabulary, seq_len = SETS[arg]
    c.task = "recommendation"
    c.tasks.recommendation.dataset = name
    c.model.kind = "mmoe"
    c.model.kinds.mmoe.items = items
    c.model.kinds.mmoe.item_dropout = 0.5
    c.model.vocab_size = vocabulary
    c.model.d_model = 128
    c.model.repeats = 1
    c.model.dropout = 0.2
    c.model.moe.expert_hidden = 128
    c.model.moe.router = "multi_gate"
    c.data.seq_len = seq_len
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
