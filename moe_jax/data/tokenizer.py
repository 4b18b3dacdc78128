"""Text to token ids and back:

`bytes`, `bpe:VOCAB` (trained on the source) and `file:PATH` (an existing tokenizer).

Whatever its kind, a tokenizer is a table of the bytes that each id stands for, and a function from
texts to ids. Decoding needs the table alone, so it is the same for all kinds, and half a UTF-8
character can wait for the rest of it.
"""

import codecs
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError


class Tokenizer(NamedTuple):
    """Made by `make` or `load`. Two tokenizers with the same fingerprint give the same ids."""

    name: str  # the spec: "bytes", "bpe:8192", "file:tokenizer.json"
    kind: str  # how the model is read again: "bytes", "huggingface", "sentencepiece"
    vocab_size: int
    boundary_id: int  # the token before and after every document, and never inside one
    pieces: tuple[bytes, ...]  # [vocab_size] the bytes of each id; special tokens have none
    prefix_space: bool  # encode puts a space before the text, which decode takes off again
    model: bytes  # the tokenizer file, empty for "bytes"
    encode_many: Callable[[Sequence[str]], list[np.ndarray]]

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text [n], without boundaries. None of them is the boundary."""
        return self.encode_many([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids that begin a document; invalid UTF-8 becomes U+FFFD.

        UserError for an unknown id.
        """
        decoder = Decoder(self)
        return decoder.feed(ids) + decoder.finish()

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: bytes of text that each id stands for; the boundary and other special
        tokens 0.
        """
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids."""
        return hashlib.sha256(f"{self.kind} {self.boundary_id} ".encode() + self.model).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
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
    """Decodes ids as they come:

    `feed` gives the text that is certain by now, `finish` what is left of it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def feed(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(self._bytes(int(i)) for i in ids))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        name, size = self._tokenizer.name, self._tokenizer.vocab_size
        if not 0 <= token < size:
            raise UserError(
                f"token {token} is outside the vocabulary of tokenizer {name} (ids 0 to {size - 1})"
            )
        piece = self._tokenizer.pieces[token]
        if self._at_start and self._tokenizer.prefix_space:
            piece = piece.removeprefix(b" ")
        self._at_start = token == self._tokenizer.boundary_id
        return piece


def bytes_tokenizer() -> Tokenizer:
    """Ids are the bytes of UTF-8; the boundary is 255, because byte 0xFF never occurs in UTF-8."""

    def encode_many(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    pieces = (*(bytes([i]) for i in range(255)), b"")
    return Tokenizer(
        "bytes", "bytes", 256, 255, pieces, prefix_space=False, model=b"", encode_many=encode_many
    )


def _make_bytes(argument: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    if argument:
        raise UserError(f"tokenizer bytes:{argument}: bytes takes no argument")
    return bytes_tokenizer()


def _make_bpe(argument: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    from moe_jax.data import tokenizer_models

    if not argument.isdecimal() or int(argument) <= 256:
        raise UserError(
            f"tokenizer bpe:{argument}: give a vocabulary of at least 257 (256 bytes and the "
            "boundary)"
        )
    return tokenizer_models.train_bpe(texts(), int(argument))


def _make_file(argument: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    from moe_jax.data import tokenizer_models

    path, _, boundary = argument.partition("#")
    try:
        model = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer file:{argument} cannot be read: {error}") from None
    kind = "huggingface" if path.endswith(".json") else "sentencepiece"
    return tokenizer_models.READERS[kind](f"file:{argument}", model, boundary)


TOKENIZERS = {"bytes": _make_bytes, "bpe": _make_bpe, "file": _make_file}
MODEL_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}


def make(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of a spec; `texts` is called only by one that must be trained.

    UserError for an unknown spec.
    """
    kind, _, argument = spec.partition(":")
    if kind not in TOKENIZERS:
        raise UserError(f"tokenizer {spec!r} is none of: bytes, bpe:VOCAB, file:PATH[#BOUNDARY]")
    return TOKENIZERS[kind](argument, texts)


def load(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote; UserError if the folder holds none or a damaged one."""
    try:
        about = json.loads((folder / "tokenizer_kind.json").read_text(encoding="utf-8"))
        tokens = bytes_tokenizer() if about["kind"] == "bytes" else _read(folder, about)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # also where a model lacks what its reader needs
        raise UserError(f"{folder} holds no complete tokenizer: {error}") from None
    if about.get("fingerprint", tokens.fingerprint) != tokens.fingerprint:
        raise UserError(
            f"{folder} holds no complete tokenizer: it is not what was written, by its digest"
        )
    return tokens


def _read(folder: pathlib.Path, about: dict[str, Any]) -> Tokenizer:
    from moe_jax.data import tokenizer_models

    model = (folder / MODEL_FILES[about["kind"]]).read_bytes()
    return tokenizer_models.READERS[about["kind"]](about["name"], model, about["boundary_id"])
