"""Spoken words: log-mel frames, an MoE encoder, mean pooling."""

import dataclasses

from moe_jax import extras
from moe_jax.data.examples import Examples
from moe_jax.models import encoder
from moe_jax.schema.config import Config
from moe_jax.schema.options import BELOW_ONE, NOT_NEGATIVE, NUMBER, option, typed_options
from moe_jax.tasks import labelled as labels
from moe_jax.tasks.speech.data import open_speech


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = option("fsdd", "tasks/speech/data.py")
    mel_bins: int = option(40, "of a frame", NUMBER)
    stack: int = option(4, "frames of 10 ms in one vector", NUMBER)
    copies: int = option(
        1,
        "of each training recording: the first as it is, the others changed in tempo and with "
        "noise",
        NUMBER,
    )
    tempo: float = option(0.1, "change of length, at most", BELOW_ONE)
    noise: float = option(0.05, "of the root mean square, at most", NOT_NEGATIVE)


def open_data(cfg: Config) -> Examples:
    extras.require(f"task = {cfg.task!r}", "kaldi_native_fbank", "sklearn")
    options = typed_options(Options, cfg.task_options)
    return open_speech(
        options.dataset,
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        mel_bins=options.mel_bins,
        stack=options.stack,
        copies=options.copies,
        tempo=options.tempo,
        noise=options.noise,
        seed=cfg.seed,
    )


TASK = labels.make(Options, open_data, "held-out recordings (higher is better)", (encoder.NAME,))
