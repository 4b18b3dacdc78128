"""Imports TensorFlow Datasets without disturbing other threads that import meanwhile.

Write `from moe_jax.data.tfds_import import tfds` inside the functions that need it: it takes half a
second.

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
    """Makes the lazy import of etils apply to this thread only."""
    # What TFDS takes for its replacement while it imports itself.
    lazy = lazy_imports_utils._lazy_import
    eager = builtins.__import__
    importing_thread = threading.get_ident()

    def import_by_thread(
        name: str,
        globals_: Any = None,
        locals_: Any = None,
        fromlist: Any = (),
        level: int = 0,
        **options: Any,
    ) -> Any:
        if threading.get_ident() == importing_thread:
            return lazy(name, globals_, locals_, fromlist, level, **options)
        return eager(name, globals_, locals_, fromlist, level)

    lazy_imports_utils._lazy_import = import_by_thread
    try:
        yield
    finally:
        lazy_imports_utils._lazy_import = lazy


with _lazy_for_this_thread():
    import tensorflow_datasets as tfds

__all__ = ["tfds"]
