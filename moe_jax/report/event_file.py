"""TensorBoard's event file where it cannot be written (any more): a disk that is full, a directory
that is gone.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Hides PyTorch from the import of tensorboardX, which would import it where it is installed.

    That takes a second of every start, and tensorboardX needs it for tensors of PyTorch alone.
    """
    if "torch" in sys.modules:
        yield
        return
    # Python refuses to import what is None here, as if it was not installed.
    hidden: Any = None
    sys.modules["torch"] = hidden
    try:
        yield
    finally:
        del sys.modules["torch"]


def outlast(writer: Any) -> Any:
    """Returns the tensorboardX.SummaryWriter; its file drops what it cannot write from here on,
    instead of raising an error.

    An error would end the thread that writes the file with a traceback, and the next few events
    would wait for that thread for ever. The same figures are in metrics.jsonl, which does say that
    it cannot be written.
    """
    # tensorboardX has no public name for the file.
    file = writer.file_writer.event_writer._ev_writer
    for name in ("write_event", "flush", "close"):
        setattr(file, name, _silent(getattr(file, name)))
    return writer


def _silent(method: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        # A file that has been closed raises ValueError.
        with contextlib.suppress(OSError, ValueError):
            return method(*args)

    return called
