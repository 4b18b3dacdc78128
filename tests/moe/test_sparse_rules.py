"""Sparse weights of experts: patterns and rules of masks, worked by hand.

What they do in training: test_sparse_weights.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.sparse.patterns import PATTERNS
from moe_jax.moe.sparse.patterns.contract import Shaped, largest
from moe_jax.moe.sparse.rules import group_lasso, magnitude, regrowth, rigl, set, static, threshold
from moe_jax.moe.sparse.rules.contract import Now, first_masks


def shaped(name, **options):
    return Shaped(PATTERNS[name], PATTERNS[name].options(**options))


def now(step=1, steps=10, rate=0.5):
    return Now(jnp.int32(step), steps, jnp.float32(rate), jax.random.key(0))


def matrix(*rows):
    """One expert's matrix [1, I, O]."""
    return {"w": jnp.array([rows], jnp.float32)}


# Patterns, by hand.


def test_exactly_as_many_are_chosen_and_ties_go_to_the_first():
    scores = jnp.array([[1.0, 3.0, 3.0, 3.0, 2.0]])
    chosen = [largest(scores, count, 1)[0].astype(int).tolist() for count in range(6)]
    want = [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    assert chosen == want


def test_unstructured_counts_in_each_expert_alone():
    # density 0.5 of 4: two of the first expert, two of the second, however small those are; an
    # expert may be one vector
    w = {"w": jnp.array([[9.0, -8.0, 7.0, 6.0], [0.1, 0.2, -0.4, 0.3]])}
    masks = first_masks(w, shaped("unstructured", density=0.5), static.Options())
    assert masks["w"].astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_n_m_runs_along_the_inputs():
    # columns are outputs: of the first, 5 and 4 of inputs 0-3, then 1 and 3; rows are never
    # compared
    w = matrix([5, 1], [2, 2], [-4, 3], [3, 4], [0, -9], [1, 8], [3, 7], [-1, 6])
    masks = first_masks(w, shaped("n_m", n=2, m=4), static.Options())
    assert masks["w"][0, :, 0].astype(int).tolist() == [1, 0, 1, 0, 0, 1, 1, 0]
    assert masks["w"][0, :, 1].astype(int).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("balanced", "want"), [(True, [[1, 1], [0, 0]]), (False, [[1, 0], [1, 0]])]
)
def test_blocks(balanced, want):
    # 2 x 2 blocks with root mean squares [[4, 3], [3.5, 1]] over (input, output); balanced: the
    # best of each column
    w = matrix([4, 4, 3, 3], [-4, 4, 3, -3], [3.5, 3.5, 1, 1], [3.5, 3.5, -1, 1])
    shape = shaped("blocks", density=0.5, block=2, balanced=balanced)
    np.testing.assert_allclose(
        shape.norms(w)["w"][0, 0], [[4, 3.5], [3, 1]], rtol=1e-6
    )  # [output, input]
    mask = np.asarray(first_masks(w, shape, static.Options())["w"][0], int)
    assert mask[::2, ::2].tolist() == want and (mask == np.kron(want, np.ones((2, 2)))).all()


def test_blocks_keep_gate_and_up_apart():
    w = {"w_in": jnp.arange(16.0).reshape(1, 4, 2, 2)}  # [E, D, P, F]
    mask = first_masks(w, shaped("blocks", density=0.5, block=2, balanced=True), static.Options())[
        "w_in"
    ]
    assert mask.shape == (1, 4, 2, 2) and mask[0, 2:].all() and not mask[0, :2].any()


def test_a_unit_is_its_columns_and_its_row():
    # squares of unit 0: 1 + 1 in w_in (gate and up of one input), 4 in w_out: sqrt(6 / 3); of unit
    # 1: 9 + 0, 0: sqrt(9 / 3)
    w = {"w_in": jnp.array([[[[1.0, 3.0], [-1.0, 0.0]]]]), "w_out": jnp.array([[[2.0], [0.0]]])}
    shape = shaped("units", density=0.5)
    np.testing.assert_allclose(shape.norms(w)["units"], [[2**0.5, 3**0.5]], rtol=1e-6)
    masks = first_masks(w, shape, static.Options())
    assert masks["w_in"].tolist() == [[[[False, True], [False, True]]]] and masks[
        "w_out"
    ].tolist() == [[[False], [True]]]


# Rules, by hand.


def test_threshold_of_the_article():
    w = matrix([0.5, -0.2], [0.3, -0.6])

    def zero(w, kept, least):
        options = threshold.Options(threshold=least)
        shape = shaped("unstructured", density=0.5)
        return threshold.below_to_zero(w, kept, shape, now(), options)

    np.testing.assert_allclose(zero(w, {}, 0.3)["w"][0], [[0.5, 0], [0.3, -0.6]], rtol=1e-6)
    # of the density: the second largest of the first values, and from then on that magnitude
    shape = shaped("unstructured", density=0.5)
    kept = threshold.first_thresholds(w, shape, threshold.Options(threshold=0.0))
    np.testing.assert_allclose(kept["w"], [0.5])
    back = zero(matrix([0.4, -0.7], [0.5, 0.0]), kept, 0.0)
    np.testing.assert_allclose(back["w"][0], [[0, -0.7], [0.5, 0]], rtol=1e-6)
    masks = first_masks(w, shaped("unstructured", density=0.5), static.Options(threshold=0.3))
    assert masks["w"][0].astype(int).tolist() == [[1, 0], [1, 1]]


def test_magnitude_pruning_follows_the_cubic():
    # final density 0.2, steps 2 to 10: at step 6 half the way, 0.2 + 0.8 / 8 = 0.3
    options = magnitude.Options(begin=0.1, end=0.5, every=3)
    density = [
        float(magnitude.cubic_density(now(step, 20), options, 0.2)) for step in (0, 2, 6, 10, 15)
    ]
    np.testing.assert_allclose(density, [1, 1, 0.3, 0.2, 0.2], rtol=1e-6)
    due = [step for step in range(20) if magnitude.due(now(step, 20), options)]
    assert due == [3, 6, 9, 10]  # every third, and the last, so that the final density is reached
    w = {"w": jnp.arange(1.0, 11.0)[None]}
    masks = magnitude.update(w, {}, {}, shaped("unstructured", density=0.2), now(6, 20), options)
    assert masks["w"][0].astype(int).tolist() == [0] * 7 + [1] * 3


def regrown(update, fraction_options, w, mask, grads, **shape):
    masks = update(
        w,
        {"w": jnp.array(mask, bool)},
        grads,
        shaped("unstructured", **shape),
        now(0, 10),
        fraction_options,
    )
    return masks["w"][0].astype(int).tolist()


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    options = rigl.Options(fraction=0.5, end=1.0, every=1)
    w = {"w": jnp.array([[4.0, -1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])}
    mask = [[1, 1, 1, 1, 0, 0, 0, 0]]
    # 2 of 4 leave: those of magnitude 1 and 2. The largest gradients elsewhere: |-9| and 8; 99 is
    # of one that stays
    grads = {"w": jnp.array([[99.0, 0.0, 0.0, 0.5, 1.0, -9.0, 7.0, 8.0]])}
    assert regrown(rigl.update, options, w, mask, grads, density=0.5) == [
        1,
        0,
        1,
        0,
        0,
        1,
        0,
        1,
    ]
    # one that just left comes back when its gradient is the largest
    grads = {"w": jnp.array([[0.0, 10.0, 0.0, 0.5, 1.0, -9.0, 7.0, 8.0]])}
    assert regrown(rigl.update, options, w, mask, grads, density=0.5) == [
        1,
        1,
        1,
        0,
        0,
        1,
        0,
        0,
    ]
    fraction = [
        float(rigl.fraction(now(step, 20), rigl.Options(fraction=0.4, end=0.5)))
        for step in (0, 5, 10)
    ]
    np.testing.assert_allclose(
        fraction, [0.4, 0.2, 0], atol=1e-6
    )  # 0.4 / 2 (1 + cos(pi / 2)) half way
    assert [
        s for s in range(12) if regrowth.regrowth_due(now(s, 20), set.Options(every=4, end=0.5))
    ] == [
        0,
        4,
        8,
    ]


def test_set_replaces_the_smallest_at_random():
    w = {"w": jnp.where(jnp.arange(200) < 100, jnp.arange(200.0, 0, -1), 0)[None]}
    mask = [[1] * 100 + [0] * 100]
    after = regrown(set.update, set.Options(fraction=0.3), w, mask, {}, density=0.5)
    assert sum(after) == 100 and after[:70] == [1] * 70  # the 70 largest stay
    assert 10 < sum(after[100:]) < 30  # 30 come, of 130 places at random: about 23 of the 100 here


def test_group_lasso_is_the_proximal_step():
    # unit 0: n = 3 entries (2, 2, 1), norm 3; cut = rate 0.5 * strength 1 * sqrt(3): factor 1 -
    # 0.866 / 3. Unit 1: norm 0.5 < 0.866
    w = {"w_in": jnp.array([[[[2.0, 0.3], [2.0, 0.4]]]]), "w_out": jnp.array([[[1.0], [0.0]]])}
    new = group_lasso.shrink_units(
        w, {}, shaped("units", density=1.0), now(), group_lasso.Options(strength=1.0)
    )
    factor = 1 - 0.5 * 3**0.5 / 3
    np.testing.assert_allclose(new["w_in"][0, 0], [[2 * factor, 0], [2 * factor, 0]], rtol=1e-6)
    np.testing.assert_allclose(new["w_out"][0], [[factor], [0]], rtol=1e-6)
    assert (np.asarray(new["w_in"][..., 1]) == 0).all()

    # it minimises |x - w|^2 / 2 + cut |x|, w of length 3: a little to either side is worse
    def value(s):
        return (s - 3) ** 2 / 2 + 0.5 * 3**0.5 * s

    assert value(3 * factor) < min(value(3 * factor + 1e-3), value(3 * factor - 1e-3))
