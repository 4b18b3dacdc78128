"""Freed memory is kept, unless the user has chosen how malloc works."""

import os
import subprocess
import sys
from pathlib import Path

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


# A block of 256 MB; then what the process has of the system, in MB, and what the mapping of the
# block is marked with ("hg": it may have huge pages).
HEAP = """
import ctypes, re
from moe_jax.runtime import memory
assert memory.keep()
block = bytearray(b"x" * 2**28)
at = ctypes.addressof(ctypes.c_char.from_buffer(block))
status = open("/proc/self/status").read()
mapping = r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$"
maps = re.findall(mapping, open("/proc/self/smaps").read(), re.S | re.M)
flags = [flags for first, end, flags in maps if int(first, 16) <= at < int(end, 16)]
print(int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) // 1024, *flags)
"""


def overcommits() -> bool:
    """Returns whether this system counts memory that is touched, and not addresses."""
    counted = Path("/proc/sys/vm/overcommit_memory")
    return counted.exists() and counted.read_text().strip() != "2"


@pytest.mark.skipif(not overcommits(), reason="this system counts addresses as memory")
def test_the_heap_may_have_huge_pages_and_takes_no_memory_for_that():
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    done = subprocess.run(
        [sys.executable, "-c", HEAP], env=environment, capture_output=True, text=True, check=True
    )
    resident, *flags = done.stdout.split()
    # Two copies of 256 MB at most.
    assert int(resident) < 700
    assert "hg" in flags
