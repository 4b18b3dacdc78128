"""Programs that run once are compiled with fewer optimisations, and compute the same."""

import jax
import numpy as np
import pytest
import tiny

from moe_jax.models.functions import make_model
from moe_jax.parallel import mesh
from moe_jax.parallel.compiling import runs_once
from moe_jax.train_step import initial, jit_initial


@pytest.mark.parametrize("flags", ["", "--xla_backend_optimization_level=0"])
def test_flags_of_the_user_are_kept(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert runs_once() == ({} if flags else {"xla_backend_optimization_level": 1})


@pytest.mark.full  # the usual compilation of the two takes most of its time
def test_first_parameters_are_those_of_a_usual_compilation():
    cfg = tiny.build((2, 1, 1), {"model.dtype": "float32", "model.param_dtype": "float32"})
    key = jax.random.key(3)
    with jax.set_mesh(mesh.make(cfg.mesh, jax.devices()[:2])):
        model = make_model(cfg.model)
        usual = jax.jit(initial(cfg, model))(key)
        once = jit_initial(cfg, model)(key)
    for a, b in zip(jax.tree.leaves(usual), jax.tree.leaves(once), strict=True):
        np.testing.assert_array_equal(a, b)
