"""Labels as numbers: checked against the number of classes before anything is looked up by them.

NumPy counts a negative index from the end, and JAX moves an index that is out of range to the
nearest that is not. So a label that is none would become the first or the last class, without a
word.
"""

import numpy as np

from moe_jax.errors import UserError

NONE = -1  # the label of an example that has none, by the convention of TFDS


def checked(label: int, classes: int, where: str) -> int:
    """The label, from 0 to classes - 1, or NONE; UserError for any other.

    `where`: what messages call its example.
    """
    if not NONE <= label < classes:
        raise UserError(
            f"{where} has label {label}, but the {classes} classes are 0 to {classes - 1}: the "
            "file may be damaged"
        )
    return int(label)


def all_checked(label_N: np.ndarray, classes: int, where: str) -> None:
    """UserError for labels of which one is neither from 0 to classes - 1 nor NONE.

    `where`: what messages call their file or set.
    """
    for number in np.flatnonzero((label_N < NONE) | (label_N >= classes))[:1]:
        checked(int(label_N[number]), classes, f"{where}, example {number}")


def left_out(number: int, total: int, what: str) -> tuple[str, ...]:
    """What the run tells of examples without a label."""
    return (f"{number} of {total} {what} have no label and are left out",) if number else ()
