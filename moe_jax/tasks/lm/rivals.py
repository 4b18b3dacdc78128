"""What general compressors make of the held-out text: numbers that a language model has to beat."""

import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor

from moe_jax.data.load import Dataset


def compression_bits_per_byte(train_bytes: bytes, heldout_bytes: bytes) -> dict[str, float]:
    """Bits per held-out byte of gzip -9 and xz -9, which have the training text of the same domain
    before them.

    It is the growth of the compressed size when the held-out text is appended to the training text.
    """
    together = train_bytes + heldout_bytes
    sizes = {name: size(together) - size(train_bytes) for name, size in COMPRESSORS.items()}
    return {name: 8 * grown / len(heldout_bytes) for name, grown in sizes.items()}


def _gzip(data: bytes) -> int:
    return len(gzip.compress(data, compresslevel=9, mtime=0))


def _xz(data: bytes) -> int:
    # The dictionary of -9 is 64 MB, for which it takes 674 MB of memory; one that holds the data
    # packs it just as well.
    dictionary = max(1 << 16, 1 << (len(data) - 1).bit_length()) if data else 1 << 16
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(dictionary, 1 << 26)}]
    return len(lzma.compress(data, filters=filters))


COMPRESSORS = {"gzip": _gzip, "xz": _xz}


def compression_table(dataset: Dataset, most_bytes: int) -> dict[str, dict[str, float]]:
    """Returns the baselines of every domain from at most `most_bytes` of text of each split."""

    def of_domain(domain: str) -> dict[str, float]:
        texts = [dataset.text(split, domain)[:most_bytes] for split in ("train", "heldout")]
        return compression_bits_per_byte(*texts)

    with ThreadPoolExecutor() as threads:  # the compressors leave the interpreter's lock
        return dict(zip(dataset.domains, threads.map(of_domain, dataset.domains)))
