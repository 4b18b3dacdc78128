"""The Free Spoken Digit Dataset: recordings/DIGIT_SPEAKER_INDEX.wav."""

import io
import re
import tarfile

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Given, GivenFile
from moe_jax.errors import UserError

NAME = re.compile(r"\d_[a-z]+_(\d+)\.wav")
# Indices below it are taken, as for the figures of docs/tasks.md; 0 to 4 are the test part.
TAKEN = 15
SPEAKERS = 6


def convert(given: Given) -> Converted:
    """Returns a tar archive of the recordings below TAKEN of each digit and speaker."""
    patterns = "|".join(f"[0-9]_*_{index}.wav" for index in range(TAKEN))
    files = given.many(patterns, "recordings")
    recordings = {name: file for name, file in files.items() if NAME.fullmatch(name)}
    expected = 10 * SPEAKERS * TAKEN
    if len(recordings) < expected:
        raise UserError(
            f"--from {given} holds {len(recordings)} of {expected} recordings "
            f"DIGIT_SPEAKER_INDEX.wav with indices below {TAKEN}: give the folder recordings of "
            "the repository"
        )
    for file in recordings.values():
        _check_wav(file)
    note = f"{len(recordings):,} recordings: indices 0 to {TAKEN - 1} of each digit and speaker"
    return Converted({"speech/fsdd_900.tar.gz": _archive(recordings)}, (note,))


def _check_wav(file: GivenFile) -> None:
    """Raises UserError if a file is no wav file, or shorter or longer than its head says."""
    # "RIFF", size of what follows, "WAVE".
    head = file.data[:12]
    size = int.from_bytes(head[4:8], "little") + 8
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise UserError(f"{file.path} is no wav file")
    if len(file.data) != size:
        raise UserError(
            f"{file.path} holds {len(file.data)} bytes, but its head says {size}: it was cut"
        )


def _archive(files: dict[str, GivenFile]) -> bytes:
    """Returns a tar archive of the files, the same bytes for the same files."""
    archive = io.BytesIO()
    # A new TarInfo has neither a time nor an owner, which would differ from machine to machine.
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, file in files.items():
            member = tarfile.TarInfo(f"recordings/{name}")
            member.size = len(file.data)
            tar.addfile(member, io.BytesIO(file.data))
    return archive.getvalue()
