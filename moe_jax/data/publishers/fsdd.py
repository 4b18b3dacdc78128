"""The Free Spoken Digit Dataset: recordings/DIGIT_SPEAKER_INDEX.wav."""

import io
import re
import tarfile

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Found, Given
from moe_jax.errors import UserError

NAME = re.compile(r"\d_[a-z]+_(\d+)\.wav")
# Indices below it are taken, as for the figures of docs/tasks.md; 0 to 4 are the test part.
TAKEN = 15
SPEAKERS = 6


def convert(given: Given) -> Converted:
    """Returns a tar archive of the recordings below TAKEN of each digit and speaker."""
    wanted = "|".join(f"[0-9]_*_{index}.wav" for index in range(TAKEN))
    found = {
        name: file
        for name, file in given.many(wanted, "recordings").items()
        if NAME.fullmatch(name)
    }
    if len(found) < 10 * SPEAKERS * TAKEN:
        raise UserError(
            f"--from {given} holds {len(found)} of {10 * SPEAKERS * TAKEN} recordings "
            "DIGIT_SPEAKER_INDEX.wav "
            f"with indices below {TAKEN}: give the folder recordings of the repository"
        )
    for file in found.values():
        _check(file)
    note = f"{len(found):,} recordings: indices 0 to {TAKEN - 1} of each digit and speaker"
    return Converted({"speech/fsdd_900.tar.gz": _archive(found)}, (note,))


def _check(file: Found) -> None:
    """UserError if a file is no wav file, or shorter or longer than its head says."""
    head, size = file.data[:12], int.from_bytes(file.data[4:8], "little") + 8
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise UserError(f"{file.place} is no wav file")
    if len(file.data) != size:
        raise UserError(
            f"{file.place} holds {len(file.data)} bytes, but its head says {size}: it was cut"
        )


def _archive(files: dict[str, Found]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, file in files.items():
            member = tarfile.TarInfo(f"recordings/{name}")
            member.size = len(file.data)
            tar.addfile(member, io.BytesIO(file.data))
    return archive.getvalue()
