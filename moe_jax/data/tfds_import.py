"""TensorFlow Datasets, imported so that other threads can go on importing meanwhile:

`from moe_jax.data.tfds_import import tfds`.

Import this module inside the functions that need it: it takes half a second.

TFDS replaces `builtins.__import__` while it imports itself (etils.epy.lazy_imports), for all
threads. If another thread imports just then, such as the one that draws a progress bar, it gets
"Relative import statements not supported" or a module that is none. Here the replacement is for the
importing thread alone.
"""

import builtins
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from etils.epy import lazy_imports_utils


@contextlib.contextmanager
def _lazy_for_this_thread() -> Iterator[None]:
    lazy, eager, mine = lazy_imports_utils._lazy_import, builtins.__import__, threading.get_ident()

    def of_thread(
        name: str,
        globals_: Any = None,
        locals_: Any = None,
        fromlist: Any = (),
        level: int = 0,
        **options: Any,
    ) -> Any:
        if threading.get_ident() == mine:
            return lazy(name, globals_, locals_, fromlist, level, **options)
        return eager(name, globals_, locals_, fromlist, level)

    lazy_imports_utils._lazy_import = of_thread
    try:
        yield
    finally:
        lazy_imports_utils._lazy_import = lazy


with _lazy_for_this_thread():
    import tensorflow_datasets as tfds

__all__ = ["tfds"]
