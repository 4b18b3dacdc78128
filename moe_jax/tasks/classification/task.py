"""Text classification: sentiment, word senses, sections, intents.

A bidirectional encoder reads the text, a head its pooled output.
"""

from moe_jax.data.examples import Examples
from moe_jax.schema.config import Config
from moe_jax.tasks import labelled as labels
from moe_jax.tasks.classification.data import open_classification


def open_data(cfg: Config) -> Examples:
    options = cfg.task_options
    return open_classification(
        options["dataset"],
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        tokens=options["tokens"],
        heldout_every=cfg.data.heldout_every,
        select=options["select"],
        seed=cfg.seed,
    )


TASK = labels.make(open_data, "held-out texts (higher is better)")
