"""Checks that labels are classes before anything is looked up by them.

NumPy counts a negative index from the end, and JAX moves an index that is out of range to the
nearest one in range. So a wrong label would silently become the first or the last class.
"""

import numpy as np

from moe_jax.errors import UserError

# The label of an example that has none, by the convention of TFDS.
NONE = -1


def checked(label: int, classes: int, where: str) -> int:
    """Returns the label if it is 0 .. classes - 1, or NONE. Raises UserError for any other.

    `where`: the name of its example in messages.
    """
    if not NONE <= label < classes:
        raise UserError(
            f"{where} has label {label}, but the {classes} classes are 0 to {classes - 1}: the "
            "file may be damaged"
        )
    return int(label)


def all_checked(label_N: np.ndarray, classes: int, where: str) -> None:
    """Raises UserError for the first of the labels that is neither 0 .. classes - 1 nor NONE.

    `where`: the name of their file or set in messages.
    """
    wrong = np.flatnonzero((label_N < NONE) | (label_N >= classes))
    if len(wrong):
        # `checked` has the message.
        first = wrong[0]
        checked(int(label_N[first]), classes, f"{where}, example {first}")


def left_out(number: int, total: int, what: str) -> tuple[str, ...]:
    """Returns the note for the log of the run that `number` examples have no label."""
    if not number:
        return ()
    return (f"{number} of {total} {what} have no label and are left out",)
