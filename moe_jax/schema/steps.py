"""Steps as a config writes them: parsed once, when the config is built."""

from typing import NamedTuple

from moe_jax.errors import UserError


class Due(NamedTuple):
    """Holds the steps at which something is done: those named, and each multiple of a number."""

    steps: frozenset[int]
    every: tuple[int, ...]
    # As the config has it.
    text: str

    def __call__(self, step: int) -> bool:
        return step in self.steps or any(step % n == 0 for n in self.every)

    def __bool__(self) -> bool:
        """Says whether there is any such step: a tuple of three would always be true."""
        return bool(self.steps or self.every)

    @property
    def first(self) -> int | None:
        # The first multiple of a number is the number itself.
        return min({*self.steps, *self.every}, default=None)


def due(text: str, path: str) -> Due:
    """Returns the steps of "100,200", "every 50", both ("1,every 50"), or "" (none). Raises
    UserError.
    """
    steps, every = set(), []
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        # "every 50" or "100": what is left must be a number.
        number = part.removeprefix("every ").strip()
        if not number.isdecimal() or int(number) < 1:
            raise UserError(
                f'{path} = "{text}": {part!r} is neither a step nor "every N": write 100,200 or '
                "every 50"
            )
        if part.startswith("every "):
            every.append(int(number))
        else:
            steps.add(int(number))
    return Due(frozenset(steps), tuple(every), text)


def profile_range(text: str, path: str) -> tuple[int, int] | None:
    """Returns (10, 13) of "10:13", which traces steps 10, 11 and 12; None of "".

    Raises UserError.
    """
    if not text:
        return None
    first, _, last = str(text).partition(":")
    are_numbers = first.isdecimal() and last.isdecimal()
    if not (are_numbers and int(first) < int(last)):
        raise UserError(
            f'{path} = "{text}" is no range of steps: write FIRST:LAST, as in profile=10:13'
        )
    return int(first), int(last)
