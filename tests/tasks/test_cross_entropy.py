"""The loss of tokens against log_softmax, and its gradient, with the vocabulary whole and split."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from moe_jax.parallel.mesh import BATCH, P
from moe_jax.tasks.cross_entropy import negative_log_likelihood

B, S, V = 4, 3, 8


def plain(logits_BSV, target_BS):
    log_BSV = jax.nn.log_softmax(logits_BSV)
    return -np.take_along_axis(log_BSV, target_BS[..., None], -1)[..., 0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1), (1, 2, 4), (2, 1, 2)])
def test_it_is_log_softmax_on_every_mesh(float64, shape):
    random = np.random.default_rng(0)
    # One token is nearly certain, one nearly impossible: exponentials alone would overflow.
    logits = random.normal(size=(B, S, V))
    logits[0, 0] *= 1000
    target = random.integers(0, V, (B, S)).astype(np.int32)
    weight = random.normal(size=(B, S))

    def loss(logits_BSV, target_BS, weight_BS):
        nll_BS = negative_log_likelihood(logits_BSV, target_BS)
        return (nll_BS * weight_BS).sum(), nll_BS

    with jax.set_mesh(meshes.make(*shape)):
        arrays = (
            jax.device_put(
                logits, jax.NamedSharding(jax.sharding.get_mesh(), P(BATCH, None, "model"))
            ),
            *(
                jax.device_put(z, jax.NamedSharding(jax.sharding.get_mesh(), P(BATCH)))
                for z in (target, weight)
            ),
        )
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, nll), gradient = run(*arrays)
        assert gradient.sharding.spec == arrays[0].sharding.spec
    np.testing.assert_allclose(nll, plain(logits, target), rtol=1e-12)
    probability = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    wanted = (probability - np.eye(V)[target]) * weight[..., None]
    np.testing.assert_allclose(gradient, wanted, atol=1e-12)
