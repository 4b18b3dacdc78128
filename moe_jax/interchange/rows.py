"""How tensors of Hugging Face become parameters of ours, and back: by reshapes and transposes
alone, so that both ways are exact.

A row names a parameter and its axes, a letter each, and says how the tensor is made of the same
axes, a word for each dimension:

    Row("attention/weights/q", "DHA", "self_attn.q_proj.weight", "HA D")

is a tensor [H A, D]. Axes that the words lack are told by the name: of

    Row("moe/experts/w_in", "EDPF", "mlp.experts.{E}.{P}.weight", "F D", {"P": ("gate", "up")})

there is a tensor [F, D] for each expert and for gate and up. The word "1" is a dimension of one.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One parameter of ours, and the tensors that it is made of."""

    # Below its block, or below the root.
    ours: str
    axes: str
    # Below its layer, or below the root.
    theirs: str
    their_axes: str
    # What stands in the name for each place along an axis; its number where the axis is not here.
    labels: Mapping[str, tuple[str, ...]] = {}
    # The row is of parameters alone whose axes are so long.
    sizes: Mapping[str, int] = {}

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Returns whether the row is that of a parameter of this shape."""
        lengths = dict(zip(self.axes, shape, strict=True))
        return all(lengths[axis] == length for axis, length in self.sizes.items())


class Piece(NamedTuple):
    """A tensor of theirs, and its place in a parameter of ours."""

    name: str
    shape: tuple[int, ...]
    # Of the parameter: whole axes, or a place.
    index: tuple[int | slice, ...]
    # Of the tensor, with a dimension for each axis.
    split: tuple[int, ...]
    # Of the axes of `split` in the parameter.
    order: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns what stands at `index` of the parameter."""
        return tensor.reshape(self.split).transpose(self.order)

    def to_theirs(self, parameter: np.ndarray) -> np.ndarray:
        """Returns the tensor that `to_ours` takes."""
        back = np.argsort(self.order)
        return parameter[self.index].transpose(back).reshape(self.shape)


def pieces(row: Row, shape: tuple[int, ...], prefix: str) -> Iterator[Piece]:
    """Yields the tensors of a parameter of this shape; `prefix` begins their names."""
    size = dict(zip(row.axes, shape, strict=True))
    words = [word.replace("1", "") for word in row.their_axes.split()]
    inner = "".join(words)
    named = [axis for axis in row.axes if axis not in inner]
    kept = [axis for axis in row.axes if axis in inner]
    split = tuple(size[axis] for axis in inner)
    order = tuple(inner.index(axis) for axis in kept)
    their_shape = tuple(math.prod(size[axis] for axis in word) for word in words)
    for places in itertools.product(*(range(size[axis]) for axis in named)):
        at = dict(zip(named, places, strict=True))
        labels = {axis: row.labels[axis][i] if axis in row.labels else i for axis, i in at.items()}
        index = tuple(at.get(axis, slice(None)) for axis in row.axes)
        yield Piece(prefix + row.theirs.format(**labels), their_shape, index, split, order)
