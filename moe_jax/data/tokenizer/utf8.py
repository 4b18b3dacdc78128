"""The tokenizer `bytes`: each byte of the UTF-8 text is one id."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError

# Byte 0xFF never occurs in UTF-8.
BOUNDARY_ID = 255


def bytes_tokenizer() -> Tokenizer:
    """Returns the tokenizer whose ids are the bytes of UTF-8, with 255 as the boundary."""
    pieces = [bytes([byte]) for byte in range(256)]
    pieces[BOUNDARY_ID] = b""
    return Tokenizer(
        name="bytes",
        kind="bytes",
        vocab_size=256,
        boundary_id=BOUNDARY_ID,
        pieces=tuple(pieces),
        prefix_space=False,
        model=b"",
        encode_many=_encode_many,
    )


def _encode_many(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]


def make(argument: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer of the spec `bytes`. Raises UserError if an argument follows it."""
    if argument:
        raise UserError(f"tokenizer bytes:{argument}: bytes takes no argument")
    return bytes_tokenizer()
