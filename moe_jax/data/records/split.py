"""Which examples are held out: one in `every`, by a hash of what an example is recognised by.

The rule needs no list and no order: equal keys are always on the same side, so no held-out example
has its equal in training, and adding examples moves none of the others.
"""

import hashlib
import re


def is_heldout(key: bytes, every: int) -> bool:
    """True for about one key in `every`; always the same for the same key."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % every == 0


def key_of_text(text: str) -> bytes:
    """The words of a text in lower case: texts that differ in white space, case or punctuation
    alone have one key.
    """
    words = re.findall(r"\w+", text.lower())
    return " ".join(words or [text]).encode("utf-8")


def longest_sentence(text: str) -> str:
    """What texts have in common that were made from one template: its longest sentence."""
    return max(re.split(r"(?<=[.!?:]) ", text), key=len)
