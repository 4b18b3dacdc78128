"""Ctrl-C, SIGTERM and SIGHUP: heard at once, whatever the process is doing, and obeyed where
nothing is lost by it.

A handler written in Python runs only once the main thread is back from compiled code, and a
compilation takes minutes. So a thread listens: Python's handler in C writes the number of every
signal to a pipe at once, and the thread reads it, says so, and obeys:

    at once     nothing would be lost: the process ends. So a run begins, and so it is again once
                all is saved
    noted       `Listener.note()`: a training run asks for the number between steps and batches,
                saves, and ends
    raised      `Listener.interrupt()`: KeyboardInterrupt in the main thread, for commands that have
                files or processes to clear away

A second signal ends the process at once, whatever it is in. SIGHUP, which a terminal sends when it
is closed, counts as SIGTERM; a process that was started to ignore it (nohup) goes on ignoring it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and whatever ends all processes of a group send one request twice, to a process and to
# its parent, which passes it on.
SAME_REQUEST = 0.3  # seconds
AT_ONCE, NOTED, RAISED = range(3)
KEPT = "what was saved stays, and the same command goes on from there"


class Listener:
    """Hears the signals of this process from `start` to `stop`, both to be called in the main
    thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._policy, self._number, self._time = AT_ONCE, 0, 0.0
        # Whether all that the command was for is saved: told to end, it then ends with 0.
        self.saved = False
        # How this process of several calls itself.
        self.process = ""
        self._before: dict[int, object] = {}
        self._write_end, self._wakeup_before = -1, -1

    @property
    def number(self) -> int:
        """Returns the signal that asks a training run to end; 0 = none."""
        return self._number

    @property
    def noting(self) -> bool:
        return self._policy == NOTED

    @property
    def started(self) -> bool:
        return self._write_end >= 0

    def start(self) -> None:
        self._time = 0.0
        read_end, self._write_end = os.pipe()
        # A handler must never wait, so Python takes no pipe that would.
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._before = {number: signal.getsignal(number) for number in HEARD}
        self.claim()
        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()

    def claim(self) -> None:
        """Takes the signals (again): jax.distributed.initialize puts a handler of its own in the
        place of this one.
        """
        for number in HEARD:
            if number != signal.SIGHUP or self._before[number] != signal.SIG_IGN:
                # Without any handler Python writes nothing to the pipe.
                signal.signal(number, self._in_main_thread)

    def stop(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # pyrefly: ignore
        signal.set_wakeup_fd(self._wakeup_before)
        # This ends the thread.
        os.close(self._write_end)
        self._write_end = -1

    def note(self) -> None:
        """Has signals noted: from here on there is something to save."""
        with self._lock:
            self._policy = NOTED

    def interrupt(self) -> None:
        with self._lock:
            self._policy = RAISED

    def release(self) -> int:
        """Has a signal end the process at once, because all is saved.

        Returns the signal that was noted, and forgets it; 0 = none.
        """
        with self._lock:
            number, self._number = self._number, 0
            self._policy = AT_ONCE
        return number

    def agree(self, number: int) -> None:
        """Notes a signal that another process of the run has heard; 0 = none."""
        with self._lock:
            self._number = self._number or number

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        del frame
        # Raised once: the same request may come twice (SAME_REQUEST).
        if self._policy == RAISED and not self._number:
            self._number = number
            raise KeyboardInterrupt

    def _listen(self, read_end: int) -> None:
        while numbers := os.read(read_end, 1):
            if numbers[0] in HEARD:
                self._hear(numbers[0])
        os.close(read_end)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        with self._lock:
            if self._time and now - self._time < SAME_REQUEST:
                return
            again, self._time = bool(self._time), now
            name = self.process + signal.Signals(number).name
            if self._policy == AT_ONCE:
                say(f"{name}: interrupted; {KEPT}")
                # The main thread may be in compiled code, where no exception reaches it.
                os._exit(exit_code(number, self.saved))
            if again:
                say(f"{name} again: ended at once; {KEPT}")
                os._exit(128 + number)
            if self._policy == NOTED:
                self._number = number
                say(
                    f"{name}: heard, the run saves and ends after this step or batch (a second "
                    "signal ends it unsaved)"
                )
            else:
                say(f"{name}: heard, ending (a second signal ends it at once)")


LISTENER = Listener()


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Yields the listener of this process.

    It is started here, and stopped again, where no command has started it for the whole process.
    """
    if LISTENER.started:
        yield LISTENER
        return
    LISTENER.start()
    try:
        yield LISTENER
    finally:
        LISTENER.release()
        LISTENER.stop()


def exit_code(number: int, saved: bool) -> int:
    """Returns 128 + the number of the signal; 0 when a run was told to end by something else than
    Ctrl-C and could save all it had.
    """
    return 0 if saved and number != signal.SIGINT else 128 + number


def say(text: str) -> None:
    """Writes a line to standard error, past the streams of Python, which the main thread may be in
    the middle of. A terminal that is gone is no matter.
    """
    # The live line may have hidden the cursor.
    clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{text}\n".encode())
