"""The article's system: embedding, sparse experts over a window, aggregation, softmax.

No attention (moe_jax/models/article.py).

    python -m moe_jax.main --config configs/article.py --workdir runs/article
    python -m moe_jax.main --config configs/article.py:wordnet --config.data.folder=DATA \
        --workdir runs/article_wordnet

The variants: bytes (next byte of the embedded text, the default), and the sets of text
classification wordnet and vader. Three in four of the experts' weights are zero from the first
values on, and stay so. docs/article.md has the worked example.
"""

from moe_jax.config import defaults

CLASSES = {"bytes": 0, "wordnet": 45, "vader": 2}
VARIANTS = tuple(CLASSES)


def get_config(arg="bytes"):
    c = defaults()
    classes = CLASSES[arg]
    c.model.kind = "article"
    c.model.kinds.article.num_classes = classes
    c.model.kinds.article.aggregate = "gated"
    c.model.kinds.article.num_experts = 32
    c.model.moe.sparse.rule = "static"
    c.model.repeats = 0
    c.optim.learning_rate = 3e-3
    c.checkpoint.every = 200
    c.log.histogram_every = 1000
    c.eval.sample_tokens = 0
    if classes:
        c.task = "classification"
        c.tasks.classification.dataset = arg
        c.model.vocab_size = 8192
        c.data.seq_len = c.model.kinds.article.window = 48
        c.data.heldout_every = 10
        c.train.steps = 1500
        c.train.batch_size = 64
        c.eval.every = 500
        c.eval.batch_size = 256
    else:
        c.data.slice_bytes = 400_000
        c.data.heldout_bytes = 30_000
        c.train.steps = 400
        c.train.batch_size = 8
        c.eval.every = 200
        c.eval.batches = 12
        c.eval.batch_size = 16
    return c
