"""The files of a checkpoint are read for their digests by all processes of the run, each a part.

    a save            each process reads the files that it wrote itself, while it may still have
                      them in memory; process 0 reads what is left, and puts all digests together
    a verification    each process reads about as many bytes as any other, whoever wrote them

All processes see the same directory.
"""

import itertools
import json
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from moe_jax.checkpoint import manifest
from moe_jax.runtime import messages

# Where Orbax has each process write its shards. What lies elsewhere process 0 has written.
_OF_PROCESS = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")

# Calls of the main thread, which all processes make in the same order.
_calls = itertools.count()


def damage(path: Path, name: str | None = None) -> str:
    """Returns what is wrong with the checkpoint at `path`, in the same words on all processes; ""
    when every file has its digest.

    All processes call it. From the main thread they need no `name`.
    """
    name = name or f"verify/{next(_calls)}"
    own = manifest.damage(path, jax.process_index(), jax.process_count())
    return next(filter(None, messages.gather(name, own)), "")


class Save:
    """What the processes tell each other of one save, in the background.

    All of them make one, in the main thread, and enter it as a context, which tells the others of
    an error. Process 0 commits the save; meanwhile the others `serve`.
    """

    def __init__(self) -> None:
        self._name = f"save/{next(_calls)}"
        self._count = itertools.count()
        self._told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, trace
        if jax.process_count() == 1:
            return
        reason = f"{type(error).__name__}: {error}" if error else ""
        if jax.process_index() == 0:
            self._tell({"end": reason})
        elif error and not self._told:
            # Process 0 waits for the digests.
            self._report({"error": reason})

    def digests(self, path: Path) -> manifest.Files:
        """Returns the digests of all files below `path`, in process 0; nothing in the others.

        Raises OSError where a process could not write or read its files.
        """
        names = manifest.file_names(path)
        if jax.process_index() > 0:
            own = [name for name in names if _writer(name) == jax.process_index()]
            self._report({"files": manifest.digests(path, own)})
            return {}
        others = range(1, jax.process_count())
        digests = manifest.digests(path, [name for name in names if _writer(name) not in others])
        for process in others:
            report = json.loads(messages.receive(f"{self._name}/digests/{process}", forget=True))
            if "error" in report:
                raise OSError(f"process {process}: {report['error']}")
            digests |= report["files"]
        if gone := sorted(digests.keys() - set(names)):
            raise OSError(f"{gone[0]} was written, and process 0 cannot find it")
        # What another process did not see is not left without a digest.
        left = [name for name in names if name not in digests]
        return digests | manifest.digests(path, left)

    def damage(self, path: Path) -> str:
        """Returns what is wrong with another checkpoint, which all processes read; for process 0.

        It lies in the directory that the others `serve`.
        """
        if jax.process_count() == 1:
            return manifest.damage(path)
        return damage(path, self._tell({"verify": path.name}))

    def serve(self, directory: Path) -> None:
        """Verifies what process 0 asks for, until its save ends. Raises OSError when that failed.

        For all other processes.
        """
        while True:
            name = self._next()
            asked = json.loads(messages.receive(name))
            if asked.get("end"):
                raise OSError(f"process 0: {asked['end']}")
            if "end" in asked:
                return
            damage(directory / asked["verify"], name)

    def _report(self, message: dict[str, Any]) -> None:
        """Sends process 0 the digests of this process, or why there are none."""
        messages.send(f"{self._name}/digests/{jax.process_index()}", json.dumps(message))
        self._told = True

    def _tell(self, message: dict[str, Any]) -> str:
        """Sends the others a message of process 0, and returns its name."""
        name = self._next()
        messages.send(name, json.dumps(message))
        return name

    def _next(self) -> str:
        return f"{self._name}/{next(self._count)}"


def _writer(name: str) -> int:
    """Returns the number of the process that wrote a file."""
    found = _OF_PROCESS.search(name)
    return int(found[1]) if found else 0
