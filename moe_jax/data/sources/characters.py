"""Decodes bytes into characters, by the same rules for the text of every kind of file.

What is no text is refused with one clear message.
"""

import codecs
import contextlib
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, cast

from moe_jax.data.sources import packed
from moe_jax.errors import UserError

# Byte order marks at the beginning of a text, and their encodings. The mark of UTF-32 begins with
# that of UTF-16, so it is tried first.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_text(path: str) -> IO[str]:
    """Opens the text of a plain or packed file, in UTF-8, or in UTF-16 or UTF-32 with a mark.

    Raises UserError for what is no text.
    """
    with packed.open_bytes(path) as file:
        head = file.read(packed.HEAD)
    text_encoding = encoding(head, path)
    # Opened a second time: not every packed stream can go back to its beginning.
    raw = cast(io.RawIOBase, packed.open_bytes(path))
    return io.TextIOWrapper(io.BufferedReader(raw, packed.BLOCK), encoding=text_encoding)


def encoding(head: bytes, where: str) -> str:
    """Returns the encoding of a text that begins with `head`.

    Raises UserError, which says what the content is, for what is no text or lacks its mark.
    """
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    content = packed.what_else(head)
    if content:
        raise UserError(f"{where} is no text but {content}")
    if b"\0" in head:
        raise UserError(f"{where} is not UTF-8 but {_with_nul(head)}")
    # It drops the mark of UTF-8, where there is one.
    return "utf-8-sig"


def _with_nul(head: bytes) -> str:
    """Returns what content without a mark is that has NUL bytes, and the way out.

    Letters of English leave the high bytes of UTF-16 and UTF-32 0, so the encoding shows in which
    of every four bytes are mostly 0.
    """
    # A whole number of characters of UTF-32.
    fours = head[: len(head) // 4 * 4]
    mostly_zero = tuple(
        bool(fours) and fours[i::4].count(0) * 4 / len(fours) > 0.5 for i in range(4)
    )
    # Little-endian has the high bytes behind the low one, big-endian before it.
    layouts = {
        "UTF-32LE": (False, True, True, True),
        "UTF-32BE": (True, True, True, False),
        "UTF-16LE": (False, True, False, True),
        "UTF-16BE": (True, False, True, False),
    }
    for name, layout in layouts.items():
        if mostly_zero == layout:
            return (
                f"{name} without a mark, by its NUL bytes: convert it, as in "
                f"`iconv -f {name} -t UTF-8`"
            )
    return (
        f"no text, or text in another encoding (byte {head.index(0)} is NUL): convert it by iconv, "
        "or drop the NUL bytes, as in `tr -d '\\000'`"
    )


def plain(text: str | bytes | None, where: str) -> str:
    """Returns the text of one record as UTF-8 with one \\n at the end of each line; "" for None.

    Raises UserError for a text that is no UTF-8 or no valid Unicode, and for one with NUL
    characters, which no text has. `where`: the name of the record in messages.
    """
    if text is None:
        return ""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} {wrong_bytes(error)}") from None
    if "\0" in text:
        before = text[: text.index("\0")]
        raise UserError(
            f"{where} has a NUL character {_after(before)}, which no text has: drop it, or convert "
            "what is no UTF-8 by iconv"
        )
    # Python's strings, and JSON, may have half a surrogate pair, which stands for no character.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is no valid Unicode: half a surrogate pair at character {error.start}"
        ) from None
    # Most texts have none, and are not copied.
    if "\r" not in text:
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def wrong_bytes(error: UnicodeDecodeError) -> str:
    """Returns what is wrong with bytes that do not decode, and the way out.

    It is to stand behind the name of the file or record.
    """
    # A text without a mark is taken for UTF-8; for any other encoding there was one.
    if not error.encoding.lower().startswith("utf-8"):
        return (
            f"is no valid {error.encoding.upper()}, though its mark says so ({error.reason}): it "
            "may be damaged"
        )
    before = error.object[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
    return (
        f"is not UTF-8 (byte {error.object[error.start]:#04x} {_after(before)}): convert it from "
        "what it is written in, as in `iconv -f WINDOWS-1252 -t UTF-8`, and look at what comes out"
    )


def _after(text: str) -> str:
    """Returns where something stands behind `text`, by the last characters of it."""
    return f"after {text[-20:]!r}" if text else "at its beginning"


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what goes wrong while `path` is read into a UserError."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {wrong_bytes(error)}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read{_reason(error, path)}") from None


def _reason(error: BaseException, path: str) -> str:
    """Returns why a file cannot be read and the way out, to stand behind "cannot be read"."""
    # What zstandard says of a window of more than 128 MB.
    if "too much memory" in str(error):
        return (
            ": it was packed with a window of more than 128 MB (zstd --long=28 or more), which "
            f"takes as much memory to read; unpack it, as in `zstd -d --long=31 {path}`, or pack "
            "it with --long=27"
        )
    # The readers say "Truncated" or "truncated".
    if isinstance(error, EOFError) or "runcated" in str(error):
        return f", it is truncated ({error}): copy it again"
    return f", it may be damaged: {error}"
