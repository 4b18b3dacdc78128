"""The tokenizer `bpe:VOCAB`: byte-level BPE, trained by the library `tokenizers`."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_jax.data.tokenizer import models
from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError

# While a BPE is trained, a piece has at most this many characters of one class (letters, digits,
# marks, white space). The time of each merge grows with the square of a piece's length, and text
# without spaces (Chinese, DNA, base64) is one piece. No word of English is as long.
LONGEST_PIECE = 64
# The classes that byte-level pieces are made of.
CHARACTER_CLASSES = (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")
# Training takes the first documents up to this size; more takes minutes for little.
TRAINING_BYTES = 100_000_000


def make(argument: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer of the spec `bpe:VOCAB`, trained on `texts()`.

    Raises UserError for a VOCAB that is no number or has no room for the bytes and the boundary.
    """
    if not argument.isdecimal() or int(argument) <= 256:
        raise UserError(
            f"tokenizer bpe:{argument}: give a vocabulary of at least 257 (256 bytes and the "
            "boundary)"
        )
    return train_bpe(texts(), int(argument))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE of at most `vocab_size` ids, the boundary among them.

    The same texts give the same tokenizer. Ctrl-C interrupts the training at once.
    """
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    # All 256 bytes are in the alphabet, so that no text is unknown.
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[models.BOUNDARY],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([_cut_long_runs(), byte_level])
    _train(bpe, _first_bytes(texts, TRAINING_BYTES), trainer)
    # Only training is slow on long pieces, so the tokenizer itself is an ordinary one.
    bpe.pre_tokenizer = byte_level
    model = bpe.to_str().encode("utf-8")
    return models.read_huggingface(f"bpe:{vocab_size}", model, models.BOUNDARY)


def _cut_long_runs() -> Any:
    """Returns the pre-tokenizer that cuts runs of one class into pieces of LONGEST_PIECE.

    It leaves shorter runs alone.
    """
    from tokenizers import Regex, pre_tokenizers

    runs = [f"{one_class}{{{LONGEST_PIECE}}}" for one_class in CHARACTER_CLASSES]
    return pre_tokenizers.Split(Regex("|".join(runs)), "isolated")


def _train(bpe: Any, texts: Iterable[str], trainer: Any) -> None:
    """Trains `bpe` in another thread, so that this one acts on signals meanwhile.

    The library computes for minutes without looking at signals. When a signal's handler raises, as
    that of Ctrl-C does, the library goes on by itself until the process ends, which is about to.
    """
    stop = threading.Event()
    texts_ended = threading.Event()
    errors: list[BaseException] = []

    def until_stopped() -> Iterator[str]:
        try:
            for text in texts:
                if stop.is_set():
                    return
                yield text
        finally:
            texts_ended.set()

    def work() -> None:
        try:
            bpe.train_from_iterator(until_stopped(), trainer)
        # Also what reading the texts raises: the waiting thread raises it again.
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stop.set()
        # A thread that runs Python code when the interpreter ends would be ended inside of the
        # library, which aborts the process.
        texts_ended.wait(5)
        raise
    if errors:
        raise errors[0]


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yields texts until `limit` bytes are reached; the last one is whole."""
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode("utf-8"))
        yield text
