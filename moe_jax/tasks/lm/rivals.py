"""What general compressors make of the held-out text: numbers that a language model has to beat."""

import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor

from moe_jax.data.load import Dataset


def compression_bits_per_byte(train_bytes: bytes, heldout_bytes: bytes) -> dict[str, float]:
    """Returns the bits per held-out byte of gzip -9 and xz -9.

    They have the training text of the same domain before them: it is the growth of the compressed
    size when the held-out text is appended to the training text.
    """
    both_bytes = train_bytes + heldout_bytes
    bits: dict[str, float] = {}
    for name, compressed_size in COMPRESSORS.items():
        growth = compressed_size(both_bytes) - compressed_size(train_bytes)
        bits[name] = 8 * growth / len(heldout_bytes)
    return bits


def _gzip(data: bytes) -> int:
    # Without the time of day, which the header has by default: the same size each time.
    return len(gzip.compress(data, compresslevel=9, mtime=0))


def _xz(data: bytes) -> int:
    # The dictionary of -9 is 64 MB, for which it takes 674 MB of memory; one that holds the data
    # packs it just as well.
    next_power_of_two = 1 << (len(data) - 1).bit_length() if data else 0
    dictionary = min(max(1 << 16, next_power_of_two), 1 << 26)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
    return len(lzma.compress(data, filters=filters))


COMPRESSORS = {"gzip": _gzip, "xz": _xz}


def compression_table(dataset: Dataset, most_bytes: int) -> dict[str, dict[str, float]]:
    """Returns the baselines of every domain from at most `most_bytes` of text of each split."""

    def of_domain(domain: str) -> dict[str, float]:
        texts = [dataset.text(split, domain)[:most_bytes] for split in ("train", "heldout")]
        return compression_bits_per_byte(*texts)

    # The compressors leave the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor() as threads:
        return dict(zip(dataset.domains, threads.map(of_domain, dataset.domains)))
