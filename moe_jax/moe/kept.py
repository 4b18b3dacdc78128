"""What the backward pass keeps of a block is named where it is computed (model.remat, stack.py).

A policy of rematerialisation sees names inside of loops too, and keeps a copy for each round, those
of rounds that nobody needs among them. So a loop whose rounds are seldom needed names nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator

_named: contextvars.ContextVar[bool] = contextvars.ContextVar("named", default=True)


def is_named() -> bool:
    """Returns whether what is traced now may be named."""
    return _named.get()


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    """Keeps nothing of what is traced inside: the backward pass computes it again."""
    token = _named.set(False)
    try:
        yield
    finally:
        _named.reset(token)
