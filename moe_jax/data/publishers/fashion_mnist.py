"""Fashion-MNIST (Xiao et al. 2017): four idx files, which are packed as they are.

An idx file begins with two zeros, the type of a value (8 = unsigned byte), the number of
dimensions, and each dimension as four bytes.
"""

import numpy as np

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Found, Given
from moe_jax.errors import UserError

# md5 sums of each file: in the publisher's README, as Debian's package packs it, and unpacked.
FILES = {
    "train-images-idx3-ubyte": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "cf8536b0aa1a6ac5fa3f23001093305c",
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    ),
    "train-labels-idx1-ubyte": (
        "25c81989df183df01b3e8a0aad5dffbe",
        "10bea18fdb374794d4bb42e356e600c9",
        "9018921c3c673c538a1fc5bad174d6f9",
    ),
    "t10k-images-idx3-ubyte": (
        "bef4ecab320f06d8554ea6380940ec79",
        "f78720b4224f21cce2f2ccf2d7a94c9a",
        "8181f5470baa50b63fa0f6fddb340f0a",
    ),
    "t10k-labels-idx1-ubyte": (
        "bb300cfdad3c16e7a12a480ee83cd310",
        "0d30e22e447f3c33dab9ed536400ac01",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}


def convert(given: Given) -> Converted:
    """Returns the four files; as many labels as images in each part."""
    found = {name: given.one(name, digests) for name, digests in FILES.items()}
    notes: list[str] = []
    for part in ("train", "t10k"):
        images, labels = (found[f"{part}-{name}-ubyte"] for name in ("images-idx3", "labels-idx1"))
        shape, (count,) = _shape(images, 3), _shape(labels, 1)
        if shape[0] != count:
            raise UserError(
                f"{images.place} has {shape[0]} images, but {labels.place} {count} labels: give "
                "one set"
            )
        notes.append(f"{shape[0]:,} images of {shape[1]} x {shape[2]} pixels in {part}")
    return Converted(
        {f"fashion_mnist/{name}.gz": file.data for name, file in found.items()}, tuple(notes)
    )


def _shape(found: Found, dimensions: int) -> tuple[int, ...]:
    """Returns the shape in the head of an idx file. UserError if the file has another size."""
    start = 4 + 4 * dimensions
    head = bytes((0, 0, 8, dimensions))
    if len(found.data) < start or found.data[:4] != head:
        raise UserError(f"{found.place} is no idx file of bytes with {dimensions} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(found.data, ">u4", dimensions, 4))
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(found.data) != expected:
        raise UserError(
            f"{found.place} holds {len(found.data)} bytes, but its head says {expected}: it was cut"
        )
    return shape
