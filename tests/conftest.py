"""Eight simulated CPU devices for every test; nothing is ever skipped for lack of hardware."""

import os

os.environ.setdefault("PJRT_NPROC", "64")  # read when jax loads: fewer threads deadlock collectives on two cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked 'full' (up to an hour)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    kept = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = kept


@pytest.fixture
def float64():
    """Runs a test in float64, where equality can be proven: no rounding tie flips a routing decision."""
    jax.config.update("jax_enable_x64", True)  # globally: a checkpoint is written and read by other threads
    yield
    jax.config.update("jax_enable_x64", False)
