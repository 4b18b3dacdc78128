"""The model as a whole: layouts that must be equal, packing, and what a mesh may not change."""

import jax
import meshes
import numpy as np
import pytest
import tiny

from moe_jax import train_step
from moe_jax.checkpoint import flat
from moe_jax.moe.layer import Batch

PATTERN = {
    "model.prefix": ("dense",),
    "model.period": ("moe", "dense"),
    "model.moe.shared_experts": 1,
    "model.dropout": 0.2,
}


def unstacked(tree, stacked):
    return flat.unstack(flat.flatten(tree), stacked)


@pytest.fixture(scope="module")
def loop():
    with jax.enable_x64(True):
        return tiny.Program((1, 1, 1), PATTERN).run(2)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model.scan": True}, marks=pytest.mark.full),
        {"model.scan": True, "model.remat": "dispatch"},
        pytest.param({"model.remat": "full"}, marks=pytest.mark.full),
        pytest.param({"model.remat": "attention+dispatch+experts"}, marks=pytest.mark.full),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_scan_and_remat_change_nothing(float64, loop, changes):
    program = tiny.Program((1, 1, 1), PATTERN | changes)
    now, rows = program.run(2)
    want, want_rows = loop
    for have_row, want_row in zip(rows, want_rows, strict=True):
        np.testing.assert_allclose(have_row["loss"], want_row["loss"], rtol=1e-13)
        np.testing.assert_array_equal(have_row["moe"]["counts"], want_row["moe"]["counts"])
    got, expected = unstacked(now.params, program.cfg.model.scan), unstacked(want.params, False)
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-11, err_msg=name)


def test_the_first_loss_is_that_of_a_guess(loop):
    """First logits are small, so that the first loss is log V and not half a nat more."""
    _, rows = loop
    vocabulary = tiny.build(changes=PATTERN).model.vocab_size
    np.testing.assert_allclose(rows[0]["nll"], np.log(vocabulary), atol=0.02)


@pytest.mark.usefixtures("standard_promotion")
def test_the_first_loss_of_a_tied_head_is_that_of_a_guess(float64):
    """At its full size an embedding that is the head guesses that every token repeats."""
    program = tiny.Program((1, 1, 1), {"model.tie_embeddings": True, "model.d_model": 64})
    _, rows = program.run(1)
    vocabulary = program.cfg.model.vocab_size
    np.testing.assert_allclose(rows[0]["nll"], np.log(vocabulary), atol=0.05)


def test_packed_documents_do_not_see_each_other(float64):
    """Logits of a document are the same whether it is packed behind another or alone in its row;
    and nothing sees the future.
    """
    program = tiny.Program(
        (1, 1, 1), {"model.attention_bias": True, "model.qk_norm": True, "train.batch_size": 2}
    )
    cfg = program.cfg
    batch = tiny.batch(cfg)
    tokens, row = batch.tokens_BS, batch.row_B
    segment = np.repeat([[1, 1, 1, 2, 2, 2, 2, 2]], 2, 0).astype(np.int32)
    position = np.repeat([[0, 1, 2, 0, 1, 2, 3, 4]], 2, 0).astype(np.int32)
    other = tokens.copy()
    other[0, :3] = (other[0, :3] + 7) % 64  # another first document
    other[1, -1] = (other[1, -1] + 7) % 64  # another last token
    with jax.set_mesh(program.mesh):
        first = program.init(jax.random.key(0))
        model = program.model.bind(first.params, first.router_state)

        def put(z):
            return meshes.put(z.astype(np.int32), "batch")

        logits = jax.jit(lambda batch: model(batch, jax.random.key(0), False)[0])

        def run(ids, seg, pos):
            return np.asarray(logits(Batch(put(ids), put(pos), put(seg), put(row))))

        packed, changed = run(tokens, segment, position), run(other, segment, position)
        shifted = np.roll(tokens, -3, 1)
        alone_segment = np.repeat([[1, 1, 1, 1, 1, 0, 0, 0]], 2, 0).astype(np.int32)
        alone = run(shifted, alone_segment, np.repeat([np.arange(8)], 2, 0))
    np.testing.assert_allclose(packed[0, 3:], changed[0, 3:], atol=1e-12)
    np.testing.assert_allclose(packed[1, :-1], changed[1, :-1], atol=1e-12)
    np.testing.assert_allclose(packed[:, 3:], alone[:, :5], atol=1e-12)
    assert np.abs(packed[0, :3] - changed[0, :3]).max() > 1e-3


@pytest.mark.usefixtures("standard_promotion")
def test_tied_embeddings_and_gelu_train(float64):
    changes = {
        "model.tie_embeddings": True,
        "model.activation": "gelu",
        "model.moe.dispatcher": "capacity",
        "optim.warmup_steps": 1,
    }
    program = tiny.Program((1, 1, 1), changes)
    with jax.set_mesh(program.mesh):
        now, losses = program.init(jax.random.key(0)), []
        fixed = tiny.put(program.cfg, tiny.batch(program.cfg))
        for _ in range(30):
            now, metrics = program.step(now, fixed)
            losses.append(float(metrics["nll"]))
    assert losses[-1] < losses[0] - 0.5  # it begins at a guess, log V
    assert not any("head" in name for name in train_step.parameter_names(now.params))


@pytest.mark.usefixtures("standard_promotion")
def test_nonfinite_gradients_change_nothing_but_the_step(float64):
    """A weight that is not finite makes the gradients so; parameters and moments stay, and the
    counter goes up.
    """
    program = tiny.Program(
        (1, 1, 1), {"model.repeats": 1, "train.nonfinite_patience": 1, "optim.ema_decay": 0.5}
    )
    first = program.run(0)[0]
    broken = jax.tree.map(lambda x: x, first.params)
    broken["repeats"][0]["blocks"][0]["moe"]["experts"]["w_out"] *= np.nan
    now, (row,) = program.run(1, first._replace(params=broken))
    assert not np.isfinite(row["loss"]) and row["skipped"] == 1 and now.step == 1
    for name in ("mu", "nu"):
        moments = jax.tree.leaves(
            getattr(
                jax.tree.leaves(now.opt_state["direction"], is_leaf=lambda z: hasattr(z, "mu"))[0],
                name,
            )
        )
        assert all((np.asarray(m) == 0).all() for m in moments)
    np.testing.assert_array_equal(now.params["ends"]["embed"], first.params["ends"]["embed"])
    jax.tree.map(np.testing.assert_array_equal, now.ema, first.ema)
    assert now.opt_state["rate"] != first.opt_state["rate"]
