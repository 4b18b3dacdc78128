"""Freed memory is kept, unless the user has chosen how malloc works."""

import os
import subprocess
import sys

import pytest

# 256 MB are touched and freed; then what the process still has of the system, in MB.
PROGRAM = """
import re
from moe_jax.runtime import memory
kept = memory.keep()
block = bytearray(b"x" * 2**28)
del block
status = open("/proc/self/status").read()
print(kept, int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize(
    ("chosen", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)], ids=["plain", "chosen"]
)
def test_freed_memory_is_kept_unless_the_user_has_chosen(chosen, kept):
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)} | chosen
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    said, megabytes = done.stdout.split()
    assert said == str(kept)
    assert (int(megabytes) > 200) == kept
