"""Image classification: patches, an MoE encoder (V-MoE, Riquelme et al. 2021, arXiv:2106.05974),
mean pooling.
"""

import dataclasses

from moe_jax import extras
from moe_jax.data.examples import Examples
from moe_jax.models import encoder
from moe_jax.schema.config import Config
from moe_jax.schema.options import COUNT, NUMBER, option, typed_options
from moe_jax.tasks import labelled as labels
from moe_jax.tasks.vision.data import open_vision


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = option("digits", 'tasks/vision/data.py, or "tfds:NAME"')
    patch: int = option(
        2, "pixels of a side of a patch; data.seq_len is the number of patches", NUMBER
    )
    copies: int = option(
        1, "of each training image: the first as it is, the others shifted and flipped", NUMBER
    )
    shift: int = option(1, "pixels, at most", COUNT)
    flip: bool = option(False, "mirrors half of the copies")


def open_data(cfg: Config) -> Examples:
    extras.require(f"task = {cfg.task!r}", "sklearn")
    options = typed_options(Options, cfg.task_options)
    return open_vision(
        options.dataset,
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        patch=options.patch,
        heldout_every=cfg.data.heldout_every,
        copies=options.copies,
        shift=options.shift,
        flip=options.flip,
        seed=cfg.seed,
    )


TASK = labels.make(Options, open_data, "held-out images (higher is better)", (encoder.NAME,))
