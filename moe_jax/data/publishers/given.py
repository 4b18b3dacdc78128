"""Finds the files that a user gives with --from by name, unpacks them, and compares digests."""

import bz2
import fnmatch
import gzip
import hashlib
import lzma
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow

from moe_jax.errors import UserError

# What reading and unpacking a damaged file raises.
DAMAGE = (
    OSError,
    EOFError,
    # A zip archive with a password.
    RuntimeError,
    # A zip archive that is packed in a way that Python does not know.
    NotImplementedError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    pyarrow.ArrowException,
)


def _lz4(data: bytes) -> bytes:
    """Returns the content of an lz4 frame; apt keeps its lists packed so."""
    with pyarrow.input_stream(pyarrow.py_buffer(data), compression="lz4") as stream:
        return stream.read()


UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".lz4": _lz4,
}


class Source(NamedTuple):
    """A file that was used, for the record of where data comes from."""

    name: str
    size: int
    sha256: str
    # The digest that it was compared with; "" = there was none.
    checked: str


class _Entry(NamedTuple):
    """One file that a user gave and that is not read yet."""

    # Without its folder and without an ending such as .gz.
    name: str
    # For messages; ARCHIVE/MEMBER in an archive.
    path: str
    unpack: Callable[[bytes], bytes] | None
    read: Callable[[], bytes]


class GivenFile(NamedTuple):
    """One file, as it was given and unpacked."""

    # For messages; ARCHIVE/MEMBER in an archive.
    path: str
    packed: bytes
    data: bytes

    def text(self) -> str:
        """Returns the data as UTF-8 text. Raises UserError where it is none."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 at byte {error.start}: give the publisher's own file"
            ) from None


class Given:
    """All files below the paths that a user gave: files, folders, tar and zip archives.

    `sources` grows with every file that is read. Archives in a folder are not opened.
    """

    def __init__(self, paths: Sequence[pathlib.Path], any_digest: bool = False) -> None:
        """Lists the files. Raises UserError for a path that is not there or an archive that is
        damaged.
        """
        self.paths = tuple(paths)
        self.any_digest = any_digest
        self.sources: list[Source] = []
        # Only listed here: files are read when a converter asks for them.
        self._entries = [entry for path in paths for entry in _entries(path)]

    def one(self, patterns: str, digests: Sequence[str] = ()) -> GivenFile:
        """Returns the one file of a name.

        Args:
          patterns: names with * in them, divided by "|", without an ending such as .gz.
          digests: md5 or sha256 sums in hexadecimal, of the file as it is or unpacked, of which one
            must fit; without any nothing is compared.
        """
        entries = self._matching(patterns)
        if len(entries) != 1:
            raise self._not_one(patterns, entries)
        file = _read(entries[0])
        self._record(file, digests)
        return file

    def _not_one(self, patterns: str, entries: Sequence[_Entry]) -> UserError:
        """Returns the error for no file, or several files, of a name."""
        wanted = patterns.replace("|", " or ")
        if entries:
            paths = ", ".join(entry.path for entry in entries[:4])
            what = f"{len(entries)} files {wanted} ({paths}): name one of them with --from FILE"
        else:
            what = (
                f"no file {wanted}, plain or packed: `python -m moe_jax data` lists what to give"
                f"{self._closed()}"
            )
        return UserError(f"--from {self} holds {what}")

    def many(self, pattern: str, what: str) -> dict[str, GivenFile]:
        """Returns all files that match, by name, sorted; they are one source, called `what`."""
        by_name = {entry.name: _read(entry) for entry in self._matching(pattern)}
        files = dict(sorted(by_name.items()))
        if files:
            # One digest of all of them: a set of three thousand files has no line for each.
            joined = b"".join(file.packed for file in files.values())
            digest = hashlib.sha256(joined).hexdigest()
            self.sources.append(
                Source(f"{len(files)} {what}, one after another", len(joined), digest, "")
            )
        return files

    def has(self, patterns: str) -> bool:
        """Returns whether any file matches."""
        return bool(self._matching(patterns))

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def _matching(self, patterns: str) -> list[_Entry]:
        """Returns the files whose name matches one of the patterns between "|"."""
        wanted = patterns.split("|")

        def matches(entry: _Entry) -> bool:
            return any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in wanted)

        return [entry for entry in self._entries if matches(entry)]

    def _closed(self) -> str:
        """Returns what to say of archives that are in a folder; "" if there is none."""
        endings = (".tar", ".tgz", ".zip")
        closed = [entry.path for entry in self._entries if entry.name.endswith(endings)]
        if not closed:
            return ""
        return f". Archives in a folder are not opened, name them: {', '.join(closed[:4])}"

    def _record(self, file: GivenFile, digests: Sequence[str]) -> None:
        """Adds a file to the sources. Raises UserError if it has none of the digests."""
        sha256 = hashlib.sha256(file.packed).hexdigest()
        checked = fitting(file, digests)
        if digests and not checked and not self.any_digest:
            raise _unfit(file, digests)
        # Without the folders of the user's machine.
        _, _, name = file.path.replace("\\", "/").rpartition("/")
        source = Source(name, len(file.packed), sha256, checked)
        if source not in self.sources:
            self.sources.append(source)


def fitting(file: GivenFile, digests: Sequence[str]) -> str:
    """Returns the digest that a file has, as given or unpacked; "" if it has none of them."""
    # Publishers give the sum of the packed file or of the unpacked one.
    for data in (file.packed, file.data):
        for name in ("md5", "sha256"):
            digest = hashlib.new(name, data).hexdigest()
            if digest in digests:
                return f"{name} {digest}"
    return ""


def _unfit(file: GivenFile, digests: Sequence[str]) -> UserError:
    """Returns the error for a file that has none of its publisher's digests."""
    # An md5 sum has 32 hexadecimal digits.
    kind = "md5" if len(digests[0]) == 32 else "sha256"
    own = hashlib.new(kind, file.packed).hexdigest()
    right = " or ".join(digests) if len(digests) < 4 else "none of the sums that the release lists"
    return UserError(
        f"{file.path} has the {kind} sum {own}, its publisher's file has {right}: it was changed "
        "or cut, or is another one; give the publisher's, or add --any_digest"
    )


def _read(entry: _Entry) -> GivenFile:
    """Reads and unpacks a file. Raises UserError if it is damaged."""
    try:
        packed = entry.read()
        data = entry.unpack(packed) if entry.unpack else packed
    except DAMAGE as error:
        raise UserError(f"{entry.path} cannot be read, it may be damaged: {error}") from None
    return GivenFile(entry.path, packed, data)


def _entries(path: pathlib.Path) -> Iterator[_Entry]:
    """Yields the files of a path: a file, a folder, a tar or zip archive.

    Raises UserError for a path that is not there, a Debian package, or a damaged archive.
    """
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield _entry(str(file), file.read_bytes)
        elif not path.is_file():
            raise UserError(f"--from {path} is neither a file nor a folder")
        elif path.suffix == ".deb":
            raise UserError(
                f"--from {path} is a Debian package: `dpkg-deb -x {path} DIR` unpacks it, then "
                "give DIR"
            )
        elif zipfile.is_zipfile(path):
            yield from _members(path, _zip_members(path))
        elif tarfile.is_tarfile(path):
            yield from _members(path, _tar_members(path))
        else:
            yield _entry(str(path), path.read_bytes)
    except DAMAGE as error:
        raise UserError(f"--from {path} cannot be read, it may be damaged: {error}") from None


def _members(path: pathlib.Path, files: Mapping[str, bytes]) -> Iterator[_Entry]:
    """Yields the members of an archive, which are unpacked already."""
    for name, data in files.items():
        # A default value keeps the data of this turn of the loop.
        yield _entry(f"{path}/{name}", lambda data=data: data)


def _zip_members(path: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of each member of a zip archive, by name."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        return {member.filename: archive.read(member) for member in members}


def _tar_members(path: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of each member of a tar archive, by name."""
    files: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            # Folders and links have no content of their own.
            opened = archive.extractfile(member) if member.isfile() else None
            if opened is not None:
                files[member.name] = opened.read()
    return files


def _entry(path: str, read: Callable[[], bytes]) -> _Entry:
    """Returns the entry of a file, whose ending says how it is packed."""
    name = path.rpartition("/")[2]
    for ending, unpack in UNPACK.items():
        if name.endswith(ending):
            return _Entry(name.removesuffix(ending), path, unpack, read)
    return _Entry(name, path, None, read)
