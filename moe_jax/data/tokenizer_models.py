"""Tokenizers of two libraries:

Hugging Face `tokenizers` (and byte-level BPE trained by it) and SentencePiece.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

EncodeMany = Callable[[Sequence[str]], list[np.ndarray]]

# of the BPE trained here; in an existing tokenizer the first of BOUNDARIES that it has
BOUNDARY = "<|boundary|>"
BOUNDARIES = (BOUNDARY, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
# Characters of a run of letters, digits, marks or white space that are one piece for the training
# of a BPE: the time of each merge grows
# with the square of a piece's length, and text without spaces (Chinese, DNA, base64) is one piece.
# No word of English is as long.
LONGEST_PIECE = 64
TRAINING_BYTES = (
    100_000_000  # a BPE is trained on the first documents up to this; more takes minutes for little
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` ids, the boundary among them.

    The same texts give the same tokenizer.

    Ctrl-C interrupts it at once.
    """
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARY],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([_cut_long_runs(), byte_level])
    _train(bpe, _first_bytes(texts, TRAINING_BYTES), trainer)
    bpe.pre_tokenizer = (
        byte_level  # encoding takes no such time, so the tokenizer itself is an ordinary one
    )
    return read_huggingface(f"bpe:{vocab_size}", bpe.to_str().encode("utf-8"), BOUNDARY)


def _cut_long_runs() -> Any:
    """The pre-tokenizer that makes a piece of LONGEST_PIECE characters out of as many of one class;
    it leaves shorter runs alone.
    """
    from tokenizers import Regex, pre_tokenizers

    classes = (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")  # as byte-level pieces are made of
    return pre_tokenizers.Split(
        Regex("|".join(f"{one}{{{LONGEST_PIECE}}}" for one in classes)), "isolated"
    )


def _train(bpe: Any, texts: Iterable[str], trainer: Any) -> None:
    """Trains in another thread, so that this one can act on a signal while the library computes for
    minutes.

    When a signal's handler raises, as that of Ctrl-C does, the library goes on by itself until the
    process ends, which is about to.
    """
    stop, all_read = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def until_stopped() -> Iterator[str]:
        try:
            for text in texts:
                if stop.is_set():
                    return
                yield text
        finally:
            all_read.set()

    def work() -> None:
        try:
            bpe.train_from_iterator(until_stopped(), trainer)
        except BaseException as error:  # of the texts' reader: for the thread that waits
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stop.set()
        all_read.wait(
            5
        )  # a thread that is in Python when the interpreter ends would be ended inside of the library, which aborts
        raise
    if failed:
        raise failed[0]


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode("utf-8"))
        yield text


def read_huggingface(name: str, model: bytes, boundary: str | int) -> Tokenizer:
    """A tokenizer.json whose tokens stand for bytes (byte-level, or SentencePiece's with byte
    fallback).
    """
    import tokenizers

    try:
        hugging = tokenizers.Tokenizer.from_buffer(model)
    except ValueError as error:
        raise UserError(f"tokenizer {name} is no tokenizer.json: {error}") from None
    hugging.no_truncation()
    hugging.no_padding()
    hugging.encode_special_tokens = True  # "</s>" written in a text is text, never the boundary

    def encode_many(texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(e.ids, np.uint32)
            for e in hugging.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    vocabulary = {id_: token for token, id_ in hugging.get_vocab(with_added_tokens=True).items()}
    added = hugging.get_added_tokens_decoder()
    to_bytes = _piece_reader(name, model)
    pieces = [
        b"" if i in added else to_bytes(vocabulary.get(i, "")) for i in range(max(vocabulary) + 1)
    ]
    for id_, token in added.items():
        pieces[id_] = pieces[id_] if token.special else token.content.encode("utf-8")
    specials = {token.content: id_ for id_, token in added.items() if token.special}
    boundary_id = _boundary_id(name, boundary, specials)
    return _tokenizer(name, "huggingface", model, pieces, boundary_id, encode_many)


def read_sentencepiece(name: str, model: bytes, boundary: str | int) -> Tokenizer:
    """A SentencePiece .model; its end of sentence (or the control symbol named) is the boundary."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
    except (RuntimeError, OSError):
        wrong = f"tokenizer {name} is neither a SentencePiece model nor, by its ending, a tokenizer.json"
        raise UserError(wrong) from None

    def encode_many(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in processor.encode(list(texts))]

    ids = range(processor.get_piece_size())
    void = [processor.is_control(i) or processor.is_unknown(i) for i in ids]
    pieces = [b"" if void[i] else _sentencepiece_bytes(processor.id_to_piece(i)) for i in ids]
    specials = {processor.id_to_piece(i): i for i in ids if processor.is_control(i)}
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
    if not 0 <= boundary_id < len(pieces):  # a list takes a negative number for one from its end
        raise UserError(
            f"tokenizer {name}: the boundary {boundary_id} is none of its ids, 0 to "
            f"{len(pieces) - 1}"
        )
    pieces[boundary_id] = b""
    prefix_space = b"".join(pieces[i] for i in encode_many(["a"])[0]).startswith(b" ")
    return Tokenizer(
        name, kind, len(pieces), boundary_id, tuple(pieces), prefix_space, model, encode_many
    )


def _boundary_id(name: str, boundary: str | int, specials: dict[str, int]) -> int:
    """The id of the boundary token: given as an id, by its name, or ("") the first known one there
    is.
    """
    if isinstance(boundary, int):
        return boundary
    for token in (boundary,) if boundary else BOUNDARIES:
        if token in specials:
            return specials[token]
    wanted = repr(boundary) if boundary else "of the usual names for the end of a document"
    there = ", ".join(list(specials)[:20])
    raise UserError(
        f"tokenizer {name} has no special token {wanted} (it has: {there}); name one, as in "
        "file:PATH#TOKEN"
    )


def _piece_reader(name: str, model: bytes):
    """The function from a token's name to the bytes that it stands for, by the decoder of the
    tokenizer.json.
    """
    decoder = json.loads(model).get("decoder") or {}
    kinds = {part["type"] for part in [decoder, *decoder.get("decoders", ())] if "type" in part}
    if "ByteLevel" in kinds:
        table = _byte_level_table()

        def byte_level(token: str) -> bytes:
            if not set(token) <= table.keys():
                raise UserError(
                    f"tokenizer {name} has the token {token!r}, which stands for no bytes: the "
                    "file may be damaged"
                )
            return bytes(table[c] for c in token)

        return byte_level
    if kinds & {"Metaspace", "ByteFallback"}:
        return _sentencepiece_bytes
    raise UserError(
        f"tokenizer {name} decodes by {', '.join(sorted(kinds)) or 'nothing'}, which loses bytes "
        "of the text: "
        "choose a byte-level one (GPT-2, Llama 3) or one with byte fallback (Llama 2, Mixtral)"
    )


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself if it prints, else the next character from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _sentencepiece_bytes(piece: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(byte[1], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")
