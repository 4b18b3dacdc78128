"""Recognises what a file is by its first bytes, and opens the content of a packed one."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, Any, NamedTuple, cast

from moe_jax.errors import UserError

# The first bytes of a file that are looked at, as many as the header of a tar archive.
HEAD = 512
# Bytes read at once.
BLOCK = 1 << 20


class Streams(io.RawIOBase):
    """The content of the bzip2 or xz streams of a file, one after another.

    It differs from bz2.BZ2File and lzma.LZMAFile in one point: what follows a stream and is no
    stream is an error (OSError). Those classes ignore it, so that one flipped bit between two
    streams loses all that comes after it.
    """

    def __init__(self, path: str, decompressor: Callable[[], Any]):
        self._file = open(path, "rb")
        self._decompressor = decompressor
        self._stream = decompressor()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Writes the next bytes of the content into `buffer` and returns their number.

        EOFError where the last stream has no end, OSError or lzma.LZMAError for damage.
        """
        content = b""
        # A decompressor may take packed bytes and give nothing yet; b"" would mean the end.
        while not content:
            if self._stream.eof:
                packed = self._after_stream()
                if not packed:
                    return 0
                self._stream = self._decompressor()
            elif self._stream.needs_input:
                packed = self._file.read(BLOCK)
                if not packed:
                    raise EOFError("it ends in the middle")
            else:
                # It holds back content that did not fit into the last buffer.
                packed = b""
            # At most as much as the buffer takes; the stream keeps the rest for the next call.
            content = self._stream.decompress(packed, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _after_stream(self) -> bytes:
        """Returns the first packed bytes of the next stream; b"" at the end of the file.

        Zeros may stand between two streams.
        """
        packed = self._stream.unused_data.lstrip(b"\0")
        while not packed:
            block = self._file.read(BLOCK)
            if not block:
                return b""
            packed = block.lstrip(b"\0")
        return packed


def _open_gzip(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path))


def _open_bzip2(path: str) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(Streams(path, bz2.BZ2Decompressor), BLOCK))


def _open_xz(path: str) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(Streams(path, lzma.LZMADecompressor), BLOCK))


def _open_zstandard(path: str) -> IO[bytes]:
    # Its reader recognises a truncated file; that of zstandard does not.
    import pyarrow

    return cast(IO[bytes], pyarrow.input_stream(path, compression="zstd"))


class Packing(NamedTuple):
    """A way to pack a file: how it is recognised and opened."""

    name: str
    # In lower case.
    endings: tuple[str, ...]
    beginnings: tuple[bytes, ...]
    open: Callable[[str], IO[bytes]]


# A zstandard file may begin with a frame to skip, of sixteen kinds.
SKIPPED = tuple(bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60))

PACKINGS = (
    Packing("gzip", (".gz", ".gzip"), (b"\x1f\x8b",), _open_gzip),
    Packing("bzip2", (".bz2", ".bzip2"), (b"BZh",), _open_bzip2),
    Packing("xz", (".xz",), (b"\xfd7zXZ\0",), _open_xz),
    Packing("zstandard", (".zst", ".zstd"), (b"\x28\xb5\x2f\xfd", *SKIPPED), _open_zstandard),
)

# First bytes of content that is neither text nor unpacked here: what it is, and the way out.
OTHERS = (
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!\x1a\x07", "a rar archive: unpack it"),
    (b"\x04\x22\x4d\x18", "packed by lz4: unpack it, as in `lz4 -d FILE`"),
    (b"\xff\x06\0\0sNaPpY", "packed by snappy: unpack it"),
    (b"\x1f\x9d", "packed by compress (.Z): unpack it, as in `gzip -d FILE`"),
    (b"PAR1\x15", "a Parquet file: name it as parquet:GLOB"),
    (b"ARROW1\0\0", "an Arrow file: write it as Parquet, or as JSON lines"),
    (b"SQLite format 3\0", "an SQLite database: write its texts as JSON lines"),
    (b"\x89HDF\r\n", "an HDF5 file: write its texts as JSON lines"),
    (b"\x93NUMPY", "an array of NumPy: write its texts as JSON lines"),
    (b"%PDF-", "a PDF: take the text out of it, as in `pdftotext FILE`"),
    (b"\x89PNG\r\n", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"\x7fELF", "a program"),
)


def packing(path: str) -> Packing | None:
    """Returns how a file is packed by its first bytes; None for a plain one.

    Raises UserError for one that is packed by its name alone.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    by_content = _packing_of(head)
    if by_content:
        return by_content
    # Read as a plain file, what is left of a damaged packed one might pass for text.
    for by_name in PACKINGS:
        if path.lower().endswith(by_name.endings):
            beginning = f"begins with {head[:4]!r}" if head else "is empty"
            raise UserError(
                f"{path} cannot be read, it may be damaged: by its name it is packed by "
                f"{by_name.name}, but it {beginning}; a plain file must not be named so"
            )
    return None


def _packing_of(head: bytes) -> Packing | None:
    """Returns how content that begins with `head` is packed; None if it is not."""
    for candidate in PACKINGS:
        if head.startswith(candidate.beginnings):
            return candidate
    return None


def open_bytes(path: str) -> IO[bytes]:
    """Opens the content of a plain or packed file."""
    packed_by = packing(path)
    return packed_by.open(path) if packed_by else open(path, "rb")


def what_else(head: bytes) -> str:
    """Returns what content that begins with `head` is if it is no text, and the way out.

    It is "" for all that is not recognised.
    """
    packed_by = _packing_of(head)
    if packed_by:
        return f"packed by {packed_by.name} (twice, if it is a file): unpack it"
    for beginning, description in OTHERS:
        if head.startswith(beginning):
            return description
    # The mark of a tar archive stands behind the names of its first file.
    return "a tar archive: unpack it" if head[257:262] == b"ustar" else ""
