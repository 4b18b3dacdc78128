"""Fashion-MNIST (Xiao et al. 2017): four idx files, which are packed as they are.

An idx file begins with two zeros, the type of a value (8 = unsigned byte), the number of
dimensions, and each dimension as four bytes.
"""

import numpy as np

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Given, GivenFile
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
    """Returns the four files. Raises UserError if a part has not as many labels as images."""
    files = {name: given.one(name, digests) for name, digests in FILES.items()}
    notes: list[str] = []
    for part in ("train", "t10k"):
        images = files[f"{part}-images-idx3-ubyte"]
        labels = files[f"{part}-labels-idx1-ubyte"]
        num_images, height, width = _shape(images, 3)
        (num_labels,) = _shape(labels, 1)
        if num_images != num_labels:
            raise UserError(
                f"{images.path} has {num_images} images, but {labels.path} {num_labels} labels: "
                "give one set"
            )
        notes.append(f"{num_images:,} images of {height} x {width} pixels in {part}")
    packed = {f"fashion_mnist/{name}.gz": file.data for name, file in files.items()}
    return Converted(packed, tuple(notes))


def _shape(file: GivenFile, dimensions: int) -> tuple[int, ...]:
    """Returns the shape in the head of an idx file.

    Raises UserError if the file has another size.
    """
    start = 4 + 4 * dimensions
    # Two zeros, unsigned bytes, the number of dimensions.
    head = bytes((0, 0, 8, dimensions))
    # ">u4": the most significant byte comes first.
    if len(file.data) < start or file.data[:4] != head:
        raise UserError(f"{file.path} is no idx file of bytes with {dimensions} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(file.data, ">u4", dimensions, 4))
    # In 64 bits: a damaged head may give a product beyond 2**31.
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(file.data) != expected:
        raise UserError(
            f"{file.path} holds {len(file.data)} bytes, but its head says {expected}: it was cut"
        )
    return shape
