"""Blocks of one kind are traced once, however many there are: a start spends its time there."""

import jax
import pytest
import tiny

from moe_jax.models.block import Block


def traces(monkeypatch, **changes):
    """How often a block is traced for the gradient of a batch, a loop of two kinds of blocks."""
    calls, call = [], Block.__call__

    def counted(self, *args):
        calls.append(self.kind)
        return call(self, *args)

    program = tiny.Program(
        (1, 1, 1), {"model.period": ("dense", "moe"), "model.repeats": 3, **changes}
    )
    monkeypatch.setattr(Block, "__call__", counted)
    with jax.set_mesh(program.mesh):
        state = jax.eval_shape(program.init, jax.random.key(0))
        jax.eval_shape(program.step, state, tiny.put(program.cfg, tiny.batch(program.cfg)))
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.remat": "full"},
        {"model.scan": True},
        # Micro-batches whose gradients add up, and such whose sums are needed first.
        {"train.micro_batch_size": 8, "model.moe.losses.balance": 0.0},
        {"train.micro_batch_size": 8, "model.moe.losses.balance": 0.01},
    ],
    ids=["plain", "remat", "scan", "one_pass", "two_passes"],
)
def test_each_kind_of_block_is_traced_once(monkeypatch, float64, changes):
    assert sorted(traces(monkeypatch, **changes)) == ["dense", "moe"]
