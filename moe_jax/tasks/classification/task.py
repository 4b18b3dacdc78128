"""Text classification: sentiment, word senses, sections, intents.

A bidirectional encoder reads the text, a head its pooled output.
"""

import dataclasses

from moe_jax import extras
from moe_jax.data.examples import Examples
from moe_jax.models import article, encoder
from moe_jax.schema.config import Config
from moe_jax.schema.options import option, typed_options
from moe_jax.tasks import labelled as labels
from moe_jax.tasks.classification.data import open_classification


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = option("vader", 'tasks/classification/data.py, or "tfds:NAME"')
    tokens: str = option(
        "bpe:8192", 'tokenizer: "bytes", or "bpe:N", trained on the training texts'
    )
    select: bool = option(
        False,
        "True: to choose settings. The test part is left out; one training text in "
        "data.heldout_every is held out instead.",
    )


def open_data(cfg: Config) -> Examples:
    extras.require(f"task = {cfg.task!r}", "sklearn")
    options = typed_options(Options, cfg.task_options)
    return open_classification(
        options.dataset,
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        tokens=options.tokens,
        heldout_every=cfg.data.heldout_every,
        select=options.select,
        seed=cfg.seed,
    )


TASK = labels.make(
    Options, open_data, "held-out texts (higher is better)", (encoder.NAME, article.NAME)
)
