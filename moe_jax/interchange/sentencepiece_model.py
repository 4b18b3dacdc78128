"""The file of a SentencePiece model, read field by field, and the tokenizer.json that gives the
same ids.

The file is a message of protocol buffers, of which the numbers of fields are those of
sentencepiece_model.proto (https://github.com/google/sentencepiece). They are read here, because the
module that sentencepiece generates asks for one version of protobuf.

What SentencePiece does to a text, and what stands for it in a tokenizer.json:

    the normalisation of characters     Precompiled, of the same table
    spaces at both ends and double ones Replace, where the model removes them
    a space before the text, U+2581     Prepend and Replace
    symbols that a user defined         Split, so that nothing else is made of them; and so that
                                        nothing that is written as a byte becomes one
    unigram or BPE, bytes as a last way the same; of BPE, merges in the order of scores

Of a unigram model the most likely cut of a text is taken. Where two are equally likely, as in long
runs of one character, rounding decides, and that differs.
"""

import json
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moe_jax.errors import UserError

SPACE = "\u2581"
# Types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
# What "<0x41>" in a text begins with: six characters, which SentencePiece never takes for a byte.
WRITTEN_BYTE = "<(?=0x[0-9A-F]{2}>)"
# SentencePiece adds scores in float32, the library tokenizers in float64.
TIE = 1e-6
# Pieces that stand side by side in a text of the comparison.
PROBE = 8


class Piece(NamedTuple):
    text: str
    score: float
    type: int


class Model(NamedTuple):
    """What decides the ids of a SentencePiece model."""

    pieces: tuple[Piece, ...]
    # UNIGRAM, BPE or another number.
    type: int
    byte_fallback: bool
    # The table of the normalisation of characters; empty = none.
    characters: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    treat_whitespace_as_suffix: bool

    def of_type(self, type_: int) -> list[Piece]:
        return [piece for piece in self.pieces if piece.type == type_]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of the fields of a message: an int, a float, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
        elif wire == 1:
            yield number, message[place : place + 8]
            place += 8
        elif wire == 2:
            length = varint()
            yield number, message[place : place + length]
            place += length
        elif wire == 5:
            yield number, struct.unpack_from("<f", message, place)[0]
            place += 4
        else:
            raise ValueError(f"a field of the wire type {wire}")


def read(name: str, file: bytes) -> Model:
    """Returns what a model says. Raises UserError where it is none."""
    try:
        message = list(fields(file))
        pieces = tuple(_piece(dict(fields(value))) for number, value in message if number == 1)
        parts = dict(message)
        trainer, normalizer = (dict(fields(parts.get(number, b""))) for number in (2, 3))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"{name} is no SentencePiece model ({error})") from None
    return Model(
        pieces=pieces,
        type=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, False)),
        characters=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
        treat_whitespace_as_suffix=bool(trainer.get(24, False)),
    )


def _piece(parts: dict[int, Any]) -> Piece:
    return Piece(parts[1].decode("utf-8"), parts.get(2, 0.0), parts.get(3, NORMAL))


def tokenizer_json(name: str, file: bytes) -> dict[str, Any]:
    """Returns the tokenizer.json that gives the ids of a model.

    Raises UserError for a model of which a tokenizer.json cannot say all, or that it was seen to
    give other ids for.
    """
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    model = read(name, file)
    for reason in _refusals(model):
        raise UserError(f"the tokenizer {name} cannot become a tokenizer.json: {reason}")
    made = tokenizers.Tokenizer(_unigram(model) if model.type == UNIGRAM else _bpe(model))
    steps: list[Any] = []
    if model.characters:
        steps.append(normalizers.Precompiled(model.characters))
    if model.remove_extra_whitespaces:
        # Spaces alone: a newline that the table has left is kept.
        ends = normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), "")
        steps += [ends, normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    made.normalizer = normalizers.Sequence(steps)
    symbols = [piece.text for piece in model.of_type(USER_DEFINED)]
    # Of two that begin alike the longer one is meant.
    alone = [re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True)]
    if model.byte_fallback:
        alone.append(WRITTEN_BYTE)
    if alone:
        pattern = tokenizers.Regex("|".join(alone))
        made.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(parts)
    special = [piece.text for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
    made.add_special_tokens(special)
    _compare(name, file, model, made)
    return json.loads(made.to_str())


def _refusals(model: Model) -> Iterator[str]:
    """Yields what a tokenizer.json has no word for."""
    if model.type not in (UNIGRAM, BPE):
        yield "it is neither a unigram model nor a BPE"
    if model.treat_whitespace_as_suffix or not model.escape_whitespaces:
        yield "its spaces are no U+2581 before words"
    if unused := model.of_type(UNUSED):
        yield f"it has pieces that are never used, {unused[0].text!r} the first"
    if len(model.of_type(UNKNOWN)) != 1:
        yield "it has not one piece for what is unknown"


def _unigram(model: Model) -> Any:
    import tokenizers

    numbers = [piece.type for piece in model.pieces]
    return tokenizers.models.Unigram(
        [(piece.text, piece.score) for piece in model.pieces],
        unk_id=numbers.index(UNKNOWN),
        byte_fallback=model.byte_fallback,
    )


def _bpe(model: Model) -> Any:
    """Returns the BPE that merges the pair whose piece has the highest score, as SentencePiece."""
    import tokenizers

    (unknown,) = model.of_type(UNKNOWN)
    ids = {piece.text: id_ for id_, piece in enumerate(model.pieces)}
    normal = {piece.text: piece.score for piece in model.of_type(NORMAL)}
    merges = []
    for text, score in normal.items():
        for place in range(1, len(text)):
            pair = text[:place], text[place:]
            if pair[0] in normal and pair[1] in normal:
                merges.append((-score, ids[text], *pair))
    return tokenizers.models.BPE(
        ids,
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=unknown.text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # A symbol that a user defined is not made of others.
        ignore_merges=bool(model.of_type(USER_DEFINED)),
    )


def are_tied(model: Model, ids: Sequence[int], others: Sequence[int]) -> bool:
    """Returns whether a unigram model finds two cuts of a text equally likely, up to rounding."""
    if model.type != UNIGRAM:
        return False
    one, other = (sum(model.pieces[id_].score for id_ in cut) for cut in (ids, others))
    return abs(one - other) <= TIE * max(abs(one), 1)


def _compare(name: str, file: bytes, model: Model, made: Any) -> None:
    """Raises UserError where both give other ids for texts of the model's own pieces."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=file)
    words = [piece.text.replace(SPACE, " ") for piece in model.of_type(NORMAL)]
    joined = ["".join(words[i : i + PROBE]) for i in range(0, len(words), PROBE)]
    texts = [*words, *joined]
    want = processor.encode(texts)
    have = made.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, want, have, strict=True):
        if ids != encoding.ids and not are_tied(model, ids, encoding.ids):
            raise UserError(
                f"the tokenizer {name} cannot become a tokenizer.json: the text {text!r} would "
                f"have the ids {encoding.ids}, and has {ids}"
            )
