"""Chooses which examples are held out: one in `every`, by a hash of a key of the example.

The rule needs no list and no order: equal keys are always on the same side, so no held-out example
has its equal in training, and adding examples moves none of the others.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Keyed(Protocol):
    """An example that says its split, or has a key to choose it by."""

    @property
    def split(self) -> str:
        """Returns the split: "train" or "heldout"; "" = chosen by the key."""
        ...

    @property
    def key(self) -> bytes:
        """Returns the key: examples that must be held out together have the same."""
        ...


Example = TypeVar("Example", bound=Keyed)


def is_heldout(key: bytes, every: int) -> bool:
    """Returns True for about one key in `every`; always the same for the same key."""
    # Not hash(): that of bytes is another in each process.
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") % every == 0


def split_examples(examples: Iterable[Example], every: int) -> dict[str, list[Example]]:
    """Returns the examples of "train" and "heldout", by their own split or else by their key."""
    parts: dict[str, list[Example]] = {"train": [], "heldout": []}
    for example in examples:
        by_key = "heldout" if is_heldout(example.key, every) else "train"
        parts[example.split or by_key].append(example)
    return parts


def key_of_text(text: str) -> bytes:
    """Returns the words of a text in lower case.

    Texts that differ in white space, case or punctuation alone have one key.
    """
    words = re.findall(r"\w+", text.lower())
    return " ".join(words or [text]).encode("utf-8")


def longest_sentence(text: str) -> str:
    """Returns the longest sentence, which texts from one template have in common."""
    return max(re.split(r"(?<=[.!?:]) ", text), key=len)
