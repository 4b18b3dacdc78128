"""All in float64, where equality can be proven."""

import jax
import meshes
import pytest
import tiny

from moe_jax.data.tokenizer import bytes_tokenizer
from moe_jax.models.functions import make_model
from moe_jax.run import open_run, write_run

SMALL = {"model.vocab_size": 257, "model.repeats": 1, "data.seq_len": 64, "mesh.data": 1}


@pytest.fixture(scope="package", autouse=True)
def in_float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="package")
def run(tmp_path_factory, in_float64):
    """A model with its first values."""
    workdir = tmp_path_factory.mktemp("run")
    cfg = tiny.build((1, 1, 1), SMALL)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, router_state = jax.jit(make_model(cfg.model).init)(jax.random.key(0))
        # A head of its first size would make all likelihoods alike.
        params["ends"]["head"] = 20 * params["ends"]["head"]
        write_run(workdir, tiny.raw(SMALL), {"params": params, "router_state": router_state}, 0)
    bytes_tokenizer().save(workdir / "tokenizer")
    return open_run(workdir)
