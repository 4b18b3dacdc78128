"""What a tokenizer is, whatever its kind: the bytes of each id, and a function from texts to ids.

Decoding needs only the bytes of each id, so it is the same for all kinds, and half a UTF-8
character can wait for the rest of it.
"""

import codecs
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.errors import UserError

# The file of a model in the folder of a saved tokenizer, by kind; "bytes" has none.
MODEL_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}


class Tokenizer(NamedTuple):
    """A tokenizer, made by `make` or `load`.

    Two tokenizers with the same fingerprint give the same ids.
    """

    # The spec: "bytes", "bpe:8192", "file:tokenizer.json".
    name: str
    # How `load` reads the model: "bytes", "huggingface", "sentencepiece".
    kind: str
    vocab_size: int
    # The token before and after every document, and never inside one.
    boundary_id: int
    # The bytes of each id [vocab_size]; special tokens have none.
    pieces: tuple[bytes, ...]
    # `encode` puts a space before the text, which `decode` takes off again.
    prefix_space: bool
    # The tokenizer file, empty for "bytes".
    model: bytes
    encode_many: Callable[[Sequence[str]], list[np.ndarray]]

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids [n] of a text; none of them is the boundary."""
        return self.encode_many([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids that begin a document; invalid UTF-8 becomes U+FFFD.

        Raises UserError for an unknown id.
        """
        decoder = Decoder(self)
        return decoder.feed(ids) + decoder.finish()

    def token_bytes(self) -> np.ndarray:
        """Returns the bytes of text that each id stands for, int32 [vocab_size].

        They are 0 for the boundary and other special tokens.
        """
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @property
    def fingerprint(self) -> str:
        """Returns the sha256 of what decides the ids."""
        head = f"{self.kind} {self.boundary_id} ".encode()
        return hashlib.sha256(head + self.model).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """Returns the smallest unsigned type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def save(self, folder: pathlib.Path) -> None:
        """Writes the tokenizer into a folder, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "name": self.name,
            "kind": self.kind,
            "boundary_id": self.boundary_id,
            "fingerprint": self.fingerprint,
        }
        (folder / "tokenizer_kind.json").write_text(json.dumps(about), encoding="utf-8")
        if self.model:
            (folder / MODEL_FILES[self.kind]).write_bytes(self.model)


class Decoder:
    """Decodes ids as they come: `feed` returns the text that is certain, `finish` the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Half a character is kept until its other bytes come.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def feed(self, ids: Iterable[int]) -> str:
        """Returns the text that the next ids complete. Raises UserError for an unknown id."""
        return self._utf8.decode(b"".join(self._bytes(int(id_)) for id_ in ids))

    def finish(self) -> str:
        """Returns what is left: U+FFFD for half a character, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        """Returns the bytes of the next id, which is checked; a list takes -1 for its last."""
        name = self._tokenizer.name
        size = self._tokenizer.vocab_size
        if not 0 <= token < size:
            raise UserError(
                f"token {token} is outside the vocabulary of tokenizer {name} (ids 0 to {size - 1})"
            )
        piece = self._tokenizer.pieces[token]
        if self._at_start and self._tokenizer.prefix_space:
            piece = piece.removeprefix(b" ")
        # Behind a boundary a new document begins, with a space to take off again.
        self._at_start = token == self._tokenizer.boundary_id
        return piece
