"""The tokenizer `file:PATH[#BOUNDARY]`: a tokenizer.json of Hugging Face, or a SentencePiece model.

Both become a table of the bytes that each id stands for, and a function from texts to ids.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError

EncodeMany = Callable[[Sequence[str]], list[np.ndarray]]
# The name of a token -> the bytes that it stands for.
PieceBytes = Callable[[str], bytes]

# Of the BPE that is trained here.
BOUNDARY = "<|boundary|>"
# An existing tokenizer takes the first of these names that it has as its boundary.
BOUNDARIES = (BOUNDARY, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


def make(argument: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer of the spec `file:PATH[#BOUNDARY]`.

    Raises UserError for a file that cannot be read or is no tokenizer.
    """
    path, _, boundary = argument.partition("#")
    try:
        model = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer file:{argument} cannot be read: {error}") from None
    kind = "huggingface" if path.endswith(".json") else "sentencepiece"
    return READERS[kind](f"file:{argument}", model, boundary)


def read_huggingface(name: str, model: bytes, boundary: str | int) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json whose tokens stand for bytes.

    That is a byte-level one, or SentencePiece's with byte fallback. `boundary` is the id or the
    name of the boundary, "" for the first of BOUNDARIES. Raises UserError for any other file.
    """
    import tokenizers

    try:
        hugging = tokenizers.Tokenizer.from_buffer(model)
    except ValueError as error:
        raise UserError(f"tokenizer {name} is no tokenizer.json: {error}") from None
    # A tokenizer.json may cut or pad texts, as the batches of its model wanted it.
    hugging.no_truncation()
    hugging.no_padding()
    # "</s>" written in a text is text, never the boundary.
    hugging.encode_special_tokens = True

    def encode_many(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = hugging.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    vocabulary = {id_: token for token, id_ in hugging.get_vocab(with_added_tokens=True).items()}
    added = hugging.get_added_tokens_decoder()
    to_bytes = _piece_bytes(name, model)
    pieces: list[bytes] = []
    # Ids may have gaps: a gap stands for no bytes.
    for id_ in range(max(vocabulary) + 1):
        if id_ not in added:
            pieces.append(to_bytes(vocabulary.get(id_, "")))
        elif added[id_].special:
            pieces.append(b"")
        else:
            # An added token stands for itself, whatever the decoder makes of other tokens.
            pieces.append(added[id_].content.encode("utf-8"))
    specials = {token.content: id_ for id_, token in added.items() if token.special}
    boundary_id = _boundary_id(name, boundary, specials)
    return _tokenizer(name, "huggingface", model, pieces, boundary_id, encode_many)


def read_sentencepiece(name: str, model: bytes, boundary: str | int) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece .model.

    `boundary` is the id or the name of a control symbol, "" for the end of sentence. Raises
    UserError for any other file.
    """
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
    except (RuntimeError, OSError):
        raise UserError(
            f"tokenizer {name} is neither a SentencePiece model nor, by its ending, a "
            "tokenizer.json"
        ) from None

    def encode_many(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in processor.encode(list(texts))]

    pieces: list[bytes] = []
    specials: dict[str, int] = {}
    for id_ in range(processor.get_piece_size()):
        piece = processor.id_to_piece(id_)
        if processor.is_control(id_):
            specials[piece] = id_
        has_bytes = not (processor.is_control(id_) or processor.is_unknown(id_))
        pieces.append(_sentencepiece_bytes(piece) if has_bytes else b"")
    boundary_id = _boundary_id(name, boundary, specials)
    return _tokenizer(name, "sentencepiece", model, pieces, boundary_id, encode_many)


READERS = {"huggingface": read_huggingface, "sentencepiece": read_sentencepiece}


def _tokenizer(
    name: str,
    kind: str,
    model: bytes,
    pieces: list[bytes],
    boundary_id: int,
    encode_many: EncodeMany,
) -> Tokenizer:
    """Returns the tokenizer of what a reader made of a model.

    Raises UserError for a boundary that is none of its ids.
    """
    # A list takes a negative index for one from its end, so the boundary is compared first.
    if not 0 <= boundary_id < len(pieces):
        raise UserError(
            f"tokenizer {name}: the boundary {boundary_id} is none of its ids, 0 to "
            f"{len(pieces) - 1}"
        )
    # The boundary is no text, whatever its name.
    pieces[boundary_id] = b""
    # Whether a space is put before a text is seen in what it makes of one.
    encoded_a = b"".join(pieces[id_] for id_ in encode_many(["a"])[0])
    return Tokenizer(
        name=name,
        kind=kind,
        vocab_size=len(pieces),
        boundary_id=boundary_id,
        pieces=tuple(pieces),
        prefix_space=encoded_a.startswith(b" "),
        model=model,
        encode_many=encode_many,
    )


def _boundary_id(name: str, boundary: str | int, specials: dict[str, int]) -> int:
    """Returns the id of the boundary: given as an id, by its name, or ("") the first usual one.

    `specials` has the id of each special token by its name. Raises UserError if it lacks the
    boundary.
    """
    if isinstance(boundary, int):
        return boundary
    candidates = (boundary,) if boundary else BOUNDARIES
    for token in candidates:
        if token in specials:
            return specials[token]
    wanted = repr(boundary) if boundary else "of the usual names for the end of a document"
    existing = ", ".join(list(specials)[:20])
    raise UserError(
        f"tokenizer {name} has no special token {wanted} (it has: {existing}); name one, as in "
        "file:PATH#TOKEN"
    )


def _piece_bytes(name: str, model: bytes) -> PieceBytes:
    """Returns the function from a token's name to its bytes, by the decoder of a tokenizer.json.

    Raises UserError for a decoder that does not give back the bytes of the text.
    """
    decoder = json.loads(model).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", ())]
    kinds = {part["type"] for part in parts if "type" in part}
    if "ByteLevel" in kinds:
        return _byte_level_bytes(name)
    if kinds & {"Metaspace", "ByteFallback"}:
        return _sentencepiece_bytes
    raise UserError(
        f"tokenizer {name} decodes by {', '.join(sorted(kinds)) or 'nothing'}, which loses bytes "
        "of the text: "
        "choose a byte-level one (GPT-2, Llama 3) or one with byte fallback (Llama 2, Mixtral)"
    )


def _byte_level_bytes(name: str) -> PieceBytes:
    """Returns the function from a token's name to its bytes, for byte-level tokenizers."""
    bytes_of = byte_of_character()

    def piece_bytes(token: str) -> bytes:
        if not set(token) <= bytes_of.keys():
            raise UserError(
                f"tokenizer {name} has the token {token!r}, which stands for no bytes: the "
                "file may be damaged"
            )
        return bytes(bytes_of[character] for character in token)

    return piece_bytes


def byte_of_character() -> dict[str, int]:
    """Returns the byte that each character of a byte-level token stands for, as GPT-2 has them.

    A byte that prints stands for itself; each other one has the next character from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(others):
        byte_of[chr(256 + offset)] = byte
    return byte_of


def _sentencepiece_bytes(piece: str) -> bytes:
    """Returns the bytes of a SentencePiece piece: <0xAB> is one byte, U+2581 a space."""
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")
