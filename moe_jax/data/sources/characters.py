"""Bytes into characters: the same rules for the text of every kind of file, and one clear message
for what is no text.
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

# Marks at the beginning of a text and the encoding that each tells. That of UTF-32 begins with that
# of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_text(path: str) -> IO[str]:
    """A stream of the text of a plain or packed file:

    UTF-8, or UTF-16 and UTF-32 with their marks. UserError for what is no text.
    """
    with packed.open_bytes(path) as file:
        head = file.read(packed.HEAD)
    found = encoding(head, path)
    raw = cast(io.RawIOBase, packed.open_bytes(path))
    return io.TextIOWrapper(io.BufferedReader(raw, packed.BLOCK), encoding=found)


def encoding(head: bytes, where: str) -> str:
    """The encoding of a text that begins with `head`.

    UserError, which says what it is, for what is no text or lacks its mark.
    """
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if what := packed.other(head):
        raise UserError(f"{where} is no text but {what}")
    if b"\0" in head:
        raise UserError(f"{where} is not UTF-8 but {_with_nul(head)}")
    return "utf-8-sig"


def _with_nul(head: bytes) -> str:
    """What a text without a mark is that has NUL bytes: in UTF-16 and UTF-32 the letters of English
    leave the high bytes 0.
    """
    whole = head[: len(head) // 4 * 4]
    zeros = [whole[place::4].count(0) * 4 / len(whole) if whole else 0 for place in range(4)]
    layouts = {
        "UTF-32LE": (False, True, True, True),
        "UTF-32BE": (True, True, True, False),
        "UTF-16LE": (False, True, False, True),
        "UTF-16BE": (True, False, True, False),
    }
    for name, layout in layouts.items():
        if tuple(share > 0.5 for share in zeros) == layout:
            return f"{name} without a mark, by its NUL bytes: convert it, as in `iconv -f {name} -t UTF-8`"
    return (
        f"no text, or text in another encoding (byte {head.index(0)} is NUL): convert it by iconv, "
        "or drop the NUL bytes, as in "
        "`tr -d '\\000'`"
    )


def plain(text: str | bytes | None, where: str) -> str:
    """The text of one record, whatever it was read from:

    None is the empty text, lines end in one \\n.

    UserError for a text that is no UTF-8 or no valid Unicode, and for one with NUL characters,
    which no text has.
    """
    if text is None:
        return ""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} {wrong_bytes(error)}") from None
    if "\0" in text:
        raise UserError(
            f"{where} has a NUL character {_after(text[: text.index(chr(0))])}, which no text has: "
            "drop it, or convert what is "
            "no UTF-8 by iconv"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is no valid Unicode: half a surrogate pair at character {error.start}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def wrong_bytes(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that do not decode, and the way out; to stand behind the name of the
    file or record.
    """
    if not error.encoding.lower().startswith("utf-8"):
        return f"is no valid {error.encoding.upper()}, though its mark says so ({error.reason}): it may be damaged"
    before = error.object[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
    return (
        f"is not UTF-8 (byte {error.object[error.start]:#04x} {_after(before)}): convert it from "
        "what it is written in, as in "
        "`iconv -f WINDOWS-1252 -t UTF-8`, and look at what comes out"
    )


def _after(text: str) -> str:
    """Where in a text something stands, by the characters before it."""
    return f"after {text[-20:]!r}" if text else "at its beginning"


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what goes wrong while `path` is read into one clear message."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {wrong_bytes(error)}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read{_reason(error, path)}") from None


def _reason(error: BaseException, path: str) -> str:
    if "too much memory" in str(error):  # what zstandard says of a window of more than 128 MB
        return (
            ": it was packed with a window of more than 128 MB (zstd --long=28 or more), which "
            "takes as much memory to read; unpack "
            f"it, as in `zstd -d --long=31 {path}`, or pack it with --long=27"
        )
    if isinstance(error, EOFError) or "runcated" in str(error):
        return f", it is truncated ({error}): copy it again"
    return f", it may be damaged: {error}"
