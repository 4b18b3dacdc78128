"""Spoken words: log-mel frames, an MoE encoder, mean pooling."""

from moe_jax.data.examples import Examples
from moe_jax.schema.config import Config
from moe_jax.tasks import labelled as labels
from moe_jax.tasks.speech.data import open_speech


def open_data(cfg: Config) -> Examples:
    options = cfg.task_options
    return open_speech(
        options["dataset"],
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        mel_bins=options["mel_bins"],
        stack=options["stack"],
        copies=options["copies"],
        tempo=options["tempo"],
        noise=options["noise"],
        seed=cfg.seed,
    )


TASK = labels.make(open_data, "held-out recordings (higher is better)")
