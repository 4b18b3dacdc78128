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


HEAP = """
import re
from moe_jax.runtime import memory
assert memory.keep()
block = bytearray(b"x" * 2**28)
status = open("/proc/self/status").read()
huge = re.findall(r"AnonHugePages:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())
print(int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) // 1024, int(huge[0]) // 1024)
"""


def system_is_told() -> bool:
    """Returns whether programs say what may have huge pages."""
    chosen = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    counted = Path("/proc/sys/vm/overcommit_memory")
    if not chosen.exists() or not counted.exists():
        return False
    return "[madvise]" in chosen.read_text() and counted.read_text().strip() != "2"


@pytest.mark.skipif(not system_is_told(), reason="this system does not ask which memory is huge")
def test_the_heap_has_huge_pages_and_takes_no_memory_for_them():
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    done = subprocess.run(
        [sys.executable, "-c", HEAP], env=environment, capture_output=True, text=True, check=True
    )
    resident, huge = map(int, done.stdout.split())
    # Two copies of 256 MB at most.
    assert resident < 700
    assert huge > 200
