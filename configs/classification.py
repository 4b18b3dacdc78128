"""Text classification by a bidirectional MoE encoder.

    python -m moe_jax.main --config configs/classification.py:wordnet --config.data.folder=DATA \
        --workdir runs/wordnet

The variant names the data: wordnet (45 supersenses of glosses), debian (20 sections of package
descriptions), vader (sentiment), banking77 (77 intents), imdb (TFDS). The end shows a TF-IDF +
linear SVM beside the model.
"""

from moe_jax.config import defaults

# Of each set: classes, places of a row, tokenizer, steps, rows of a step, pooling, dropout of
# tokens (small sets: the more).
SETS = {
    "wordnet": ("wordnet", 45, 32, "bpe:8192", 3300, 96, "mean", 0.0),
    "debian": ("debian", 20, 96, "bpe:8192", 1400, 64, "mean", 0.0),
    "vader": ("vader", 2, 48, "bpe:4096", 2400, 64, "max", 0.3),
    "banking77": ("banking77", 77, 32, "bpe:2048", 4800, 64, "max", 0.3),
    "imdb": ("tfds:imdb_reviews", 2, 256, "bpe:8192", 4000, 32, "mean", 0.0),
}
VARIANTS = tuple(SETS)


def get_config(arg="wordnet"):
    c = defaults()
    name, classes, seq_len, tokens, steps, rows, pool, token_dropout = SETS[arg]
    c.task = "classification"
    c.tasks.classification.dataset = name
    c.tasks.classification.tokens = tokens
    c.model.kind = "encoder"
    c.model.kinds.encoder.num_classes = classes
    c.model.kinds.encoder.head_dropout = 0.3
    c.model.kinds.encoder.token_dropout = token_dropout
    c.model.kinds.encoder.pool = pool
    c.model.vocab_size = int(tokens.split(":")[1])
    c.model.d_model = 96
    c.model.num_heads = c.model.num_kv_heads = 4
    c.model.repeats = 1
    c.model.moe.expert_hidden = 96
    c.model.dropout = 0.2
    c.data.seq_len = seq_len
    c.data.heldout_every = 10
    c.train.steps = steps
    c.train.batch_size = rows
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 100
    c.optim.ema_decay = 0.995
    c.eval.every = steps // 4
    c.eval.batch_size = 256
    c.eval.sample_tokens = 0
    c.log.every = 50
    c.log.histogram_every = 200
    return c
