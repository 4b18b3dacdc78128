"""The tokenizer of a task: bytes, or a BPE trained on a fixed sample of the training texts, so that
a run starts in seconds.
"""

from collections.abc import Sequence

from moe_jax.data import tokenizer

SAMPLE = (
    4_000_000  # characters; of more text a BPE of some thousand pieces learns little that is new
)


def make(spec: str, texts: Sequence[str]) -> tokenizer.Tokenizer:
    """The tokenizer of a spec ("bytes", "bpe:VOCAB", "file:PATH"), trained on every n-th of the
    texts, about SAMPLE characters.
    """
    every = -(-sum(map(len, texts)) // SAMPLE)
    return tokenizer.make(spec, lambda: texts[:: max(1, every)])
