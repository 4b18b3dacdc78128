"""The tokenizer of a task: bytes, a file, or a BPE trained on a sample of the training texts.

The sample is fixed, and small enough that a run starts in seconds.
"""

import math
from collections.abc import Sequence

from moe_jax.data import tokenizer

# Characters: of more text a BPE of some thousand pieces learns little that is new.
SAMPLE = 4_000_000


def make(spec: str, texts: Sequence[str]) -> tokenizer.Tokenizer:
    """Returns the tokenizer of a spec: "bytes", "bpe:VOCAB" or "file:PATH".

    A BPE is trained on every n-th of the texts, about SAMPLE characters.
    """
    # Every n-th of them, and not the first: texts may be sorted by their subject.
    total = sum(map(len, texts))
    every = max(1, math.ceil(total / SAMPLE))
    return tokenizer.make(spec, lambda: texts[::every])
