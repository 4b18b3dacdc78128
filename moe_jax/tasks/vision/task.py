"""Image classification: patches, an MoE encoder (V-MoE, Riquelme et al.

2021, arXiv:2106.05974), mean pooling.
"""

from moe_jax.data.examples import Examples
from moe_jax.schema.config import Config
from moe_jax.tasks import labelled as labels
from moe_jax.tasks.vision.data import open_vision


def open_data(cfg: Config) -> Examples:
    options = cfg.task_options
    return open_vision(
        options["dataset"],
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        patch=options["patch"],
        heldout_every=cfg.data.heldout_every,
        copies=options["copies"],
        shift=options["shift"],
        flip=options["flip"],
        seed=cfg.seed,
    )


TASK = labels.make(open_data, "held-out images (higher is better)")
