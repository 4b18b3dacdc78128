"""Loss spikes: what is one, and that a step with one changes nothing but the counters."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny

from moe_jax.optim import spikes
from moe_jax.train_step import initial, make_model, make_step, make_tx

SIGMA = 6.0


def after(losses, norms=None):
    """The window, and which steps were spikes, after steps of these losses."""
    window, said = spikes.begin(), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        loss, norm = jnp.float32(loss), jnp.float32(norm)
        spike = spikes.is_spike(window, loss, norm, SIGMA)
        window = spikes.advance(window, loss, norm, spike)
        said.append(bool(spike))
    return window, said


def test_a_jump_is_a_spike_by_the_mean_and_deviation_of_numpy():
    random = np.random.default_rng(0)
    losses = list(3.0 + 0.1 * random.standard_normal(spikes.WINDOW + 20))
    last = np.asarray(losses[-spikes.WINDOW :], np.float32)
    limit = last.mean() + SIGMA * last.std()
    for loss, is_one in ((limit - 1e-3, False), (limit + 1e-3, True)):
        window, said = after([*losses, loss])
        assert said[-1] == is_one and not any(said[:-1])
        assert int(window.spikes) == is_one


def test_a_gradient_that_jumps_is_a_spike_too():
    norms = [1.0 + 0.01 * (i % 3) for i in range(50)] + [2.0]
    assert after([3.0] * 51, norms)[1][-1]


def test_nothing_is_a_spike_before_the_window_is_ready():
    assert not any(after([3.0] * (spikes.READY - 1) + [100.0])[1])


def test_spikes_and_what_is_not_finite_stay_out_of_the_window():
    calm, _ = after([3.0 + 0.01 * (i % 5) for i in range(40)])
    loud, said = after([3.0 + 0.01 * (i % 5) for i in range(40)] + [50.0, np.nan, np.inf, 60.0])
    assert said[-4:] == [True, False, False, True]
    np.testing.assert_array_equal(calm.value_2W, loud.value_2W)
    assert int(loud.taken) == 40 and int(loud.spikes) == 2


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_step_that_is_a_spike_changes_nothing(shape):
    """The window says that losses were tiny, so that the next step is one."""
    float32 = {"model.dtype": "float32", "model.param_dtype": "float32"}
    changes = {"train.spike_sigma": SIGMA, "model.repeats": 1, **float32}
    cfg = tiny.build(shape, changes)
    with jax.set_mesh(meshes.make(*shape)):
        model = make_model(cfg.model)
        state = jax.jit(initial(cfg, model))(jax.random.key(0))
        step = jax.jit(make_step(cfg, model, make_tx(cfg, state.params)))
        batch = tiny.put(cfg, tiny.batch(cfg))
        calm, _ = step(state, batch)
        calm_losses = jax.tree.map(lambda z: jnp.full_like(z, 1e-3), state.spikes.value_2W)
        taken = jnp.full_like(state.spikes.taken, 40)
        window = state.spikes._replace(taken=taken, value_2W=calm_losses)
        spiked, metrics = step(state._replace(spikes=window), batch)
    assert int(metrics["spikes"]) == 1 and int(spiked.step) == 1
    # The first rate of the warm-up is 0: what moves in a calm step are the moments.
    before, calmed, kept = (
        jax.tree.leaves((z.params, z.opt_state["direction"])) for z in (state, calm, spiked)
    )
    assert all(np.array_equal(old, new) for old, new in zip(before, kept, strict=True))
    assert not all(np.array_equal(old, new) for old, new in zip(before, calmed, strict=True))
