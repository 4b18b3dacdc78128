"""Images cut into patches: scikit-learn's digits, Fashion-MNIST, and image sets of TFDS.

Held out is the test part of a set that has one, else one image in `heldout_every` by a hash of its
pixels.

Shapes: B images of a batch, N of a set, R rows of the training part (copies too), H x W pixels, C
channels. A row has S = (H / p) (W / p) patches of P = p p C values; patches and pixels are from
left to right, top to bottom.
"""

import gzip
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import examples
from moe_jax.data.examples import Classes, Examples, Fields
from moe_jax.data.records import folder as files
from moe_jax.data.records import labels, tfds_examples
from moe_jax.data.records.split import is_heldout
from moe_jax.errors import UserError

KIND = "vision"
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Of Debian's package dataset-fashion-mnist.
PACKAGED = pathlib.Path("/usr/share/datasets/fashion-mnist")


class Images(NamedTuple):
    """A set of images as it is read."""

    # uint8.
    pixels_NHWC: np.ndarray
    # An index in `labels`, or labels.NONE: the image is left out, and counted.
    label_N: np.ndarray
    # bool.
    heldout_N: np.ndarray
    labels: tuple[str, ...]


def read_digits(folder: str, heldout_every: int) -> Images:
    """Returns 1,797 handwritten digits of 8 x 8 pixels, which scikit-learn has in its package.

    They are from UCI (Alpaydin & Kaynak 1998).
    """
    from sklearn.datasets import load_digits

    del folder
    digits: Any = load_digits()
    # One channel.
    pixels = digits.images.astype(np.uint8)[..., None]
    # By the pixels, so that equal images are on the same side.
    heldout = np.array([is_heldout(image.tobytes(), heldout_every) for image in pixels])
    return Images(pixels, digits.target.astype(np.int32), heldout, tuple("0123456789"))


def read_fashion_mnist(folder: str, heldout_every: int) -> Images:
    """Returns 60,000 + 10,000 photographs of clothes, 28 x 28 (Xiao et al. 2017).

    They are in four idx files; the 10,000 are the test part.
    """
    del heldout_every
    parts = [_fashion(folder, part) for part in ("train", "t10k")]
    pixels, label = (np.concatenate(arrays) for arrays in zip(*parts))
    # The training part comes first.
    heldout = np.arange(len(pixels)) >= len(parts[0][0])
    return Images(pixels[..., None], label.astype(np.int32), heldout, FASHION)


def _fashion(folder: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (pixels [N, 28, 28], labels [N]) of "train" or "t10k".

    Raises UserError where the two files do not go together.
    """
    names = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
    pixels, label = (_idx(folder, name) for name in names)
    if pixels.shape != (len(label), 28, 28) or label.ndim != 1:
        raise UserError(
            f"{names[0]} has shape {pixels.shape} and {names[1]} {label.shape}: they must be (N, "
            "28, 28) and (N,), one of them may be damaged"
        )
    return pixels, label


def _idx(folder: str, name: str) -> np.ndarray:
    """Returns the array of an idx file of unsigned bytes, from `folder` or else from PACKAGED.

    The file begins with 0, 0, the type (8 = unsigned bytes) and the number of dimensions; the
    dimensions follow as big-endian int32, then the values.
    """
    packaged = PACKAGED / name
    try:
        path = files.find(folder, "fashion_mnist", name, "fashion_mnist")
    except UserError:
        if not packaged.exists():
            raise
        path = packaged
    try:
        data = gzip.decompress(path.read_bytes())
        # Other types of numbers have other marks, and no image set has them.
        if data[:3] != b"\0\0\x08":
            raise ValueError(f"it begins with {data[:3]!r}, not with the mark of unsigned bytes")
        num_dimensions = data[3]
        shape = np.frombuffer(data, ">i4", count=num_dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is no idx file packed with gzip, it may be damaged: {error}"
        ) from None


DATASETS: dict[str, Callable[[str, int], Images]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
}


def read_tfds(spec: str) -> Images:
    """Returns a set with one label and one image, all of one size, in each record.

    Such are tfds:mnist and tfds:cifar10.
    """
    from moe_jax.data.tfds_import import tfds

    stored = tfds_examples.open_stored(spec)
    image = stored.only(tfds.features.Image, "images")
    label = stored.only(tfds.features.ClassLabel, "class labels")
    names = tuple(stored.features[label].names)
    pixels: list[np.ndarray] = []
    numbers: list[int] = []
    heldout: list[bool] = []
    for record in stored.both(label):
        pixels.append(record.fields[image])
        numbers.append(labels.checked(record.fields[label], len(names), record.where))
        heldout.append(record.split == "heldout")
    shapes = sorted({array.shape for array in pixels})
    if len(shapes) > 1:
        raise UserError(
            f"dataset {stored.name} has images of {len(shapes)} sizes ({shapes[0]}, {shapes[1]} "
            "...): one only"
        )
    return Images(np.stack(pixels), np.array(numbers, np.int32), np.array(heldout), names)


def labelled(name: str, images: Images) -> tuple[Images, tuple[str, ...]]:
    """Returns the images that have a label, and a note for the log of how many have none.

    Raises UserError for a label that is no class.
    """
    labels.all_checked(images.label_N, len(images.labels), name)
    has_label_N = images.label_N != labels.NONE
    notes = labels.left_out(int((~has_label_N).sum()), len(has_label_N), "images")
    if not notes:
        return images, notes
    kept = images._replace(
        pixels_NHWC=images.pixels_NHWC[has_label_N],
        label_N=images.label_N[has_label_N],
        heldout_N=images.heldout_N[has_label_N],
    )
    return kept, notes


def read_images(name: str, folder: str, heldout_every: int) -> Images:
    """Returns the images of a key of DATASETS, or of tfds:NAME."""
    if name.startswith(tfds_examples.PREFIX):
        return read_tfds(name)
    if name not in DATASETS:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    return DATASETS[name](folder, heldout_every)


def open_vision(
    name: str,
    folder: str,
    *,
    seq_len: int,
    patch: int,
    heldout_every: int,
    copies: int,
    shift: int,
    flip: bool,
    seed: int,
) -> Examples:
    """Opens a key of DATASETS, or tfds:NAME, as rows `examples.LabelledVectors` of square patches
    of `patch` pixels.

    Pixels are standardised by the mean and the standard deviation of the training images, one
    number each per channel. The training part holds `copies` of each image: the first as it is, the
    others moved by up to `shift` pixels each way (what comes in repeats the border) and, with
    `flip`, half of them mirrored, as `seed` decides. Raises UserError if seq_len is not the number
    of patches.
    """
    images, notes = labelled(name, read_images(name, folder, heldout_every))
    _refuse_misfits(name, images, seq_len, patch)
    image_of_split = {
        "train": np.flatnonzero(~images.heldout_N),
        "heldout": np.flatnonzero(images.heldout_N),
    }
    num_train = len(image_of_split["train"])
    moves_R3 = _moves(num_train * copies, num_train, shift, flip, seed)
    arrays = [images.pixels_NHWC, images.label_N, images.heldout_N, moves_R3]
    channels = images.pixels_NHWC.shape[-1]
    return Examples(
        spec=name,
        batch_type=examples.LabelledVectors,
        seq_len=seq_len,
        domains=images.labels,
        rows={"train": num_train * copies, "heldout": len(image_of_split["heldout"])},
        # Without copies every image is as it is.
        fetch=_fetch(images, image_of_split, moves_R3 if copies > 1 else None, shift, patch),
        heldout_domain_R=images.label_N[image_of_split["heldout"]],
        fingerprint=examples.fingerprint([name, seq_len, patch, copies, shift, flip], arrays),
        about=Classes(
            labels=images.labels,
            tokenizer=None,
            width=patch * patch * channels,
            raw=_raw(images, image_of_split),
        ),
        notes=notes,
    )


def _fetch(
    images: Images,
    image_of_split: dict[str, np.ndarray],
    moves_R3: np.ndarray | None,
    shift: int,
    patch: int,
) -> Callable[[str, np.ndarray], Fields]:
    """Returns (split, index_B) -> the fields of these rows, which are made when they are asked for.

    `image_of_split`: {split: indices in `images`}. `moves_R3`: how the image of each training row
    is moved; None where there are no copies.
    """
    mean_C, deviation_C = _moments(images.pixels_NHWC[image_of_split["train"]])

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        # The rows of the first copies come first, then those of the second, and so on.
        image_R = image_of_split[split]
        image_B = image_R[index_B % len(image_R)]
        pixels_BHWC = images.pixels_NHWC[image_B]
        if split == "train" and moves_R3 is not None:
            pixels_BHWC = moved(pixels_BHWC, moves_R3[index_B], shift)
        standardised = (pixels_BHWC.astype(np.float32) - mean_C) / deviation_C
        values_BSP = patches(standardised, patch)
        label_B = images.label_N[image_B]
        valid_BS = np.ones(values_BSP.shape[:2], bool)
        return {
            "values_BSP": values_BSP,
            **examples.one_segment(valid_BS),
            # The domain of an image is its class.
            **examples.labelled(label_B, label_B),
        }

    return fetch


def _raw(
    images: Images, image_of_split: dict[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {split: (pixels [N, H W C], label_N)} of images that are not moved, for baselines."""
    raw: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split, index in image_of_split.items():
        pixels = images.pixels_NHWC[index].reshape(len(index), -1)
        raw[split] = pixels, images.label_N[index]
    return raw


def _refuse_misfits(name: str, images: Images, seq_len: int, patch: int) -> None:
    """Raises UserError where patches, row length or split do not go with the images."""
    height, width = images.pixels_NHWC.shape[1:3]
    if patch < 1 or height % patch or width % patch:
        raise UserError(
            f"{name}: patches of {patch} pixels do not divide images of {height} x {width}: choose "
            "a divisor"
        )
    num_patches = (height // patch) * (width // patch)
    if num_patches != seq_len:
        raise UserError(
            f"data.seq_len = {seq_len}, but an image of {name} ({height} x {width}) has "
            f"{num_patches} patches of {patch} x {patch}: set data.seq_len={num_patches}, or "
            "another size of patch"
        )
    if images.heldout_N.all() or not images.heldout_N.any():
        raise UserError(f"{name} has no training image or no held-out one: change heldout_every")


def _moments(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel, both [1, 1, 1, C] float32.

    They are computed from how often each of the 256 values occurs: exact, whatever the number of
    pixels, and without a copy of them in a wider type.
    """
    value = np.arange(256)
    mean, variance = [], []
    for channel in np.moveaxis(pixels_NHWC, -1, 0):
        count = np.bincount(channel.reshape(-1), minlength=256)
        num_pixels = count.sum()
        channel_mean = (value * count).sum() / num_pixels
        squares = (value - channel_mean) ** 2
        mean.append(channel_mean)
        variance.append((squares * count).sum() / num_pixels)
    # A channel of one value has no variance to divide by.
    deviation = np.sqrt(np.maximum(variance, 1e-6), dtype=np.float32)
    shape = (1, 1, 1, -1)
    return np.array(mean, np.float32).reshape(shape), deviation.reshape(shape)


def _moves(rows: int, images: int, shift: int, flip: bool, seed: int) -> np.ndarray:
    """Returns int8 [rows, 3]: down, right, mirrored; zero for the first copy of each image."""
    # A stream of its own: the seed alone would give the numbers that other parts of a run draw.
    random = np.random.default_rng((seed, 1))
    moves = random.integers(-shift, shift, (rows, 3), np.int8, endpoint=True)
    moves[:, 2] = random.integers(0, 2, rows) if flip else 0
    moves[:images] = 0
    return moves


def moved(pixels_BHWC: np.ndarray, move_B3: np.ndarray, shift: int) -> np.ndarray:
    """Returns the images moved down and to the right by the first two numbers of `move_B3`.

    Then they are mirrored if the third is 1. `shift` is the most that they move.
    """
    height, width = pixels_BHWC.shape[1:3]
    frame = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    framed = np.pad(pixels_BHWC, frame, mode="edge")
    # Of each pixel of the result: its line and its column in the framed image.
    down_B1, right_B1, mirror_B1 = move_B3[:, :1], move_B3[:, 1:2], move_B3[:, 2:]
    line_BH = shift - down_B1 + np.arange(height)[None]
    column_BW = shift - right_B1 + np.arange(width)[None]
    mirrored_B1 = mirror_B1 == 1
    column_BW = np.where(mirrored_B1, column_BW[:, ::-1], column_BW)
    image_B = np.arange(len(pixels_BHWC))
    # The three indices are spread over one another: [B, H, W].
    images = image_B[:, None, None]
    lines = line_BH[:, :, None]
    columns = column_BW[:, None, :]
    return framed[images, lines, columns]


def patches(values_BHWC: np.ndarray, patch: int) -> np.ndarray:
    """Returns [B, H, W, C] as patches [B, S, P], from left to right, top to bottom."""
    num, height, width, channels = values_BHWC.shape
    grid = values_BHWC.reshape(num, height // patch, patch, width // patch, patch, channels)
    # The lines within a patch go behind the columns of patches.
    grid = grid.swapaxes(2, 3)
    return grid.reshape(num, -1, patch * patch * channels)
