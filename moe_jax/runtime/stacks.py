"""What every thread of this process was in, kept in a file before a process that is stuck ends."""

import faulthandler
import threading
import time
from pathlib import Path


class Stacks:
    """The file for the stacks of this process; nothing is written where none is given."""

    def __init__(self) -> None:
        self._file: Path | None = None
        # The watchdog and the thread that hears of the others may write at the same time.
        self._lock = threading.Lock()

    def keep_in(self, file: Path) -> None:
        """Names the file. It stays when a run fails: a process may hear only then that others
        hang.
        """
        self._file = file

    def write(self, reason: str) -> str:
        """Appends the stacks of all threads, and returns a clause that says where they are.

        Args:
          reason: why they are written.

        Returns "" where no file is given, or it cannot be written.
        """
        if self._file is None:
            return ""
        try:
            with self._lock:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with open(self._file, "a") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.write("\n")
        except OSError:
            return ""
        return f"; what every thread was in is in {self._file}"


STACKS = Stacks()
