"""Eight simulated CPU devices for every test; nothing is ever skipped for lack of hardware."""

import fcntl
import gc
import os
import signal
import sys
import tempfile
from pathlib import Path

from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.runtime.memory import AT_THE_START

os.environ.setdefault(
    "PJRT_NPROC", "64"
)  # read when jax loads: fewer threads deadlock collectives on two cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if (
    "--full" not in sys.argv
):  # compiles in a third of the time; the full suite runs the code as training does, optimised
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {as_flags(QUICK)}"

import jax
import pytest

# Tracing makes objects that stay: looking through them for garbage took 7 % of the time of
# tests/models/test_block_attentions.py.
gc.set_threshold(*AT_THE_START)

# Its checks explain themselves as those of a test module do.
pytest.register_assert_rewrite("router_suite")

# A shell starts a job in the background with SIGINT ignored, and nohup ignores SIGHUP. The
# processes that tests start would
# inherit that, and never hear the signals that are sent to them.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Programs that several tests (and the processes they start) compile are compiled once. Of this
# session alone: no stale entries. The first process of the session makes the directory, and its
# workers take it.
CACHE = os.environ.get("MOE_JAX_TESTS_COMPILED", "")
if "PYTEST_XDIST_WORKER" not in os.environ or not CACHE:
    OWN_CACHE = tempfile.TemporaryDirectory(prefix="moe_jax_compiled_")
    CACHE = os.environ["MOE_JAX_TESTS_COMPILED"] = OWN_CACHE.name
for name, value in (
    ("jax_compilation_cache_dir", CACHE),
    ("jax_persistent_cache_min_compile_time_secs", 1.0),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="also run the tests marked 'full' (every documented command among them)",
    )


# Files whose longest tests take the most: first, so that the workers of `-n 2` end together.
SLOWEST = (
    "test_verify",
    "test_run",
    "test_mutations",
    "test_instruments",
    "test_depth",
    "test_model",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in SLOWEST)
    if config.getoption("--full"):
        return
    kept = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test marked `alone` measures wall time: no other worker of `-n 2` runs a test beside it."""
    if not item.config.getoption("--full"):
        return (yield)
    # The parent of a worker's own directory is that of the session. Whoever waits for the room to
    # empty holds the door,
    # so that nobody enters meanwhile.
    directory = Path(item.config._tmp_path_factory.getbasetemp())
    directory = directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory
    with open(directory / "door", "w") as door, open(directory / "room", "w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture
def float64():
    """Runs a test in float64, where equality can be proven: no rounding tie flips a routing
    decision.
    """
    jax.config.update(
        "jax_enable_x64", True
    )  # globally: a checkpoint is written and read by other threads
    yield
    jax.config.update("jax_enable_x64", False)
