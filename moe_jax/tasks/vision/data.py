"""Images cut into patches: scikit-learn's digits, Fashion-MNIST, and image sets of TFDS.

Held out is the test part of a set that has one, else one image in `heldout_every` by a hash of its
pixels. Shapes: N images of H x W pixels with C channels; a row has S = (H / p) (W / p) patches of P
= p p C values, patches and pixels from left to right, top to bottom.
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
PACKAGED = pathlib.Path(
    "/usr/share/datasets/fashion-mnist"
)  # of Debian's package dataset-fashion-mnist


class Images(NamedTuple):
    pixels_NHWC: np.ndarray  # uint8
    label_N: np.ndarray  # labels.NONE = it has none: the image is left out, and counted
    heldout_N: np.ndarray  # bool
    labels: tuple[str, ...]


def read_digits(folder: str, heldout_every: int) -> Images:
    """1,797 handwritten digits of 8 x 8 pixels, which scikit-learn has in its package (UCI,
    Alpaydin & Kaynak 1998).
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = found.images.astype(np.uint8)[..., None]
    heldout = np.array([is_heldout(image.tobytes(), heldout_every) for image in pixels])
    return Images(pixels, found.target.astype(np.int32), heldout, tuple("0123456789"))


def read_fashion_mnist(folder: str, heldout_every: int) -> Images:
    """60,000 + 10,000 photographs of clothes, 28 x 28 (Xiao et al. 2017), as its four idx files,
    with its own test part.
    """
    parts = [_fashion(folder, part) for part in ("train", "t10k")]
    pixels, label = (np.concatenate(arrays) for arrays in zip(*parts))
    heldout = np.arange(len(pixels)) >= len(parts[0][0])
    return Images(pixels[..., None], label.astype(np.int32), heldout, FASHION)


def _fashion(folder: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [N, 28, 28], labels [N]) of "train" or "t10k"; UserError where the two files do not
    go together.
    """
    names = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
    pixels, label = (_idx(folder, name) for name in names)
    if pixels.shape != (len(label), 28, 28) or label.ndim != 1:
        raise UserError(
            f"{names[0]} has shape {pixels.shape} and {names[1]} {label.shape}: they must be (N, "
            "28, 28) and (N,), one of them may be "
            "damaged"
        )
    return pixels, label


def _idx(folder: str, name: str) -> np.ndarray:
    packaged = PACKAGED / name
    try:
        path = files.find(folder, "fashion_mnist", name, "fashion_mnist")
    except UserError:
        if not packaged.exists():
            raise
        path = packaged
    try:
        data = gzip.decompress(path.read_bytes())
        if data[:3] != b"\0\0\x08":
            raise ValueError(f"it begins with {data[:3]!r}, not with the mark of unsigned bytes")
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is no idx file packed with gzip, it may be damaged: {error}"
        ) from None


DATASETS: dict[str, Callable[[str, int], Images]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
}


def read_tfds(spec: str) -> Images:
    """A set with one image of one size and one label each, such as tfds:mnist or tfds:cifar10."""
    from moe_jax.data.tfds_import import tfds

    stored = tfds_examples.open_stored(spec)
    image = stored.only(tfds.features.Image, "images")
    label = stored.only(tfds.features.ClassLabel, "class labels")
    names = tuple(stored.features[label].names)
    found = [
        (
            record.split,
            record.fields[image],
            labels.checked(record.fields[label], len(names), record.where),
        )
        for record in stored.both(label)
    ]
    shapes = sorted({pixels.shape for _, pixels, _ in found})
    if len(shapes) > 1:
        raise UserError(
            f"dataset {stored.name} has images of {len(shapes)} sizes ({shapes[0]}, {shapes[1]} "
            "...): one only"
        )
    heldout = np.array([split == "heldout" for split, _, _ in found])
    pixels = np.stack([pixels for _, pixels, _ in found])
    return Images(pixels, np.array([n for *_, n in found], np.int32), heldout, names)


def labelled(name: str, images: Images) -> tuple[Images, tuple[str, ...]]:
    """The images that have a label, and how many have none, for the log; UserError for a label that
    is no class.
    """
    labels.all_checked(images.label_N, len(images.labels), name)
    there_N = images.label_N != labels.NONE
    notes = labels.left_out(int((~there_N).sum()), len(there_N), "images")
    kept = (images.pixels_NHWC[there_N], images.label_N[there_N], images.heldout_N[there_N])
    return (Images(*kept, images.labels) if notes else images), notes


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
    `flip`, half of them mirrored, as `seed` decides. UserError if seq_len is not the number of
    patches.
    """
    if name.startswith(tfds_examples.PREFIX):
        images = read_tfds(name)
    elif name in DATASETS:
        images = DATASETS[name](folder, heldout_every)
    else:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    images, notes = labelled(name, images)
    _check(name, images, seq_len, patch)
    parts = {
        "train": np.flatnonzero(~images.heldout_N),
        "heldout": np.flatnonzero(images.heldout_N),
    }
    train = images.pixels_NHWC[parts["train"]]
    mean_C, std_C = _moments(train)
    rows = {"train": len(parts["train"]) * copies, "heldout": len(parts["heldout"])}
    moves = _moves(rows["train"], len(parts["train"]), shift, flip, seed)

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        which_B = parts[split][index_B % len(parts[split])]
        pixels = images.pixels_NHWC[which_B]
        pixels = moved(pixels, moves[index_B], shift) if split == "train" and copies > 1 else pixels
        values_BSP = patches((pixels.astype(np.float32) - mean_C) / std_C, patch)
        label_B = images.label_N[which_B]
        there_BS = np.ones(values_BSP.shape[:2], bool)
        return {
            "values_BSP": values_BSP,
            **examples.one_segment(there_BS),
            **examples.labelled(label_B, label_B),
        }

    arrays = [images.pixels_NHWC, images.label_N, images.heldout_N, moves]
    flat = {
        s: (images.pixels_NHWC[p].reshape(len(p), -1), images.label_N[p]) for s, p in parts.items()
    }
    return Examples(
        spec=name,
        batch_type=examples.LabelledVectors,
        seq_len=seq_len,
        domains=images.labels,
        rows=rows,
        fetch=fetch,
        heldout_domain_R=images.label_N[parts["heldout"]],
        fingerprint=examples.fingerprint([name, seq_len, patch, copies, shift, flip], arrays),
        about=Classes(images.labels, None, patch * patch * images.pixels_NHWC.shape[-1], flat),
        notes=notes,
    )


def _check(name: str, images: Images, seq_len: int, patch: int) -> None:
    height, width = images.pixels_NHWC.shape[1:3]
    if patch < 1 or height % patch or width % patch:
        raise UserError(
            f"{name}: patches of {patch} pixels do not divide images of {height} x {width}: choose "
            "a divisor"
        )
    num = (height // patch) * (width // patch)
    if num != seq_len:
        raise UserError(
            f"data.seq_len = {seq_len}, but an image of {name} ({height} x {width}) has {num} "
            f"patches of {patch} x {patch}: "
            f"set data.seq_len={num}, or another size of patch"
        )
    if images.heldout_N.all() or not images.heldout_N.any():
        raise UserError(f"{name} has no training image or no held-out one: change heldout_every")


def _moments(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel [1, 1, 1, C] float32, from the counts of the 256
    values: exact and small.
    """
    value = np.arange(256)
    counts = [
        np.bincount(channel.reshape(-1), minlength=256)
        for channel in np.moveaxis(pixels_NHWC, -1, 0)
    ]
    mean = [(value * count).sum() / count.sum() for count in counts]
    spread = [((value - m) ** 2 * count).sum() / count.sum() for m, count in zip(mean, counts)]
    shape = (1, 1, 1, -1)
    return np.array(mean, np.float32).reshape(shape), np.sqrt(
        np.maximum(spread, 1e-6), dtype=np.float32
    ).reshape(shape)


def _moves(rows: int, images: int, shift: int, flip: bool, seed: int) -> np.ndarray:
    """int8 [rows, 3]: down, right, mirrored; zero for the first copy of each image."""
    random = np.random.default_rng((seed, 1))
    moves = random.integers(-shift, shift, (rows, 3), np.int8, endpoint=True)
    moves[:, 2] = random.integers(0, 2, rows) if flip else 0
    moves[:images] = 0
    return moves


def moved(pixels_BHWC: np.ndarray, move_B3: np.ndarray, shift: int) -> np.ndarray:
    """Images moved down and to the right by the first two numbers of `move_B3`, then mirrored if
    the third is 1.
    """
    height, width = pixels_BHWC.shape[1:3]
    framed = np.pad(pixels_BHWC, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    down_BH = shift - move_B3[:, :1] + np.arange(height)[None]
    right_BW = shift - move_B3[:, 1:2] + np.arange(width)[None]
    right_BW = np.where(move_B3[:, 2:] == 1, right_BW[:, ::-1], right_BW)
    image_B = np.arange(len(pixels_BHWC))
    return framed[image_B[:, None, None], down_BH[:, :, None], right_BW[:, None, :]]


def patches(values_BHWC: np.ndarray, patch: int) -> np.ndarray:
    """[B, H, W, C] -> [B, S, P]."""
    num, height, width, channels = values_BHWC.shape
    split = values_BHWC.reshape(
        num, height // patch, patch, width // patch, patch, channels
    ).swapaxes(2, 3)
    return split.reshape(num, -1, patch * patch * channels)
