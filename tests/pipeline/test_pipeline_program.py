"""The compiled program of a pipeline, counted: its bubble, what moves between stages, and what 1F1B
does not keep.
"""

import jax
import pytest
import tiny

from moe_jax import config
from moe_jax.parallel import mesh
from moe_jax.parallel.compiling import QUICK
from moe_jax.pipeline import schedule
from moe_jax.plan import flops, theory
from moe_jax.plan.compiling import compile_step
from moe_jax.plan.hlo import program
from moe_jax.plan.hlo.collectives import ACTIVATIONS

FORWARD = {schedule.GPIPE: 2, schedule.ONE_F_ONE_B: 3}
ATTENTION = "attention projections"


def compiled(name, chunks=1, micro_batches=4):
    """Returns (config, the compiled step) of 4 layers and `micro_batches` of 4 rows."""
    changes = {
        "mesh.stage": 2,
        "mesh.data": 1,
        "model.scan": True,
        "model.repeats": 4,
        "model.d_model": 32,
        "model.param_dtype": "float32",
        "model.dtype": "float32",
        "train.batch_size": 4 * micro_batches,
        "train.micro_batch_size": 4,
        "train.pipeline_schedule": name,
        "train.pipeline_chunks": chunks,
    }
    cfg = config.build(tiny.raw(changes), 2)
    with jax.set_mesh(mesh.make(cfg.mesh, jax.devices()[:2])):
        return cfg, compile_step(cfg, QUICK).compiled


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        (schedule.GPIPE, 2),
        pytest.param(schedule.GPIPE, 1, marks=pytest.mark.full),
        pytest.param(schedule.ONE_F_ONE_B, 1, marks=pytest.mark.full),
        pytest.param(schedule.ONE_F_ONE_B, 2, marks=pytest.mark.full),
    ],
)
def test_the_bubble_of_the_program_is_that_of_the_formula(name, chunks):
    """FLOPs of layers that the program does beside those that are useful: forward passes, a
    backward pass of twice the work, and the bubble.
    """
    cfg, step = compiled(name, chunks)
    sizes = schedule.of(cfg)
    read = program.read(step.as_text(), cfg.mesh._asdict())
    per_token = flops.forward_per_token(cfg.model, cfg.data.seq_len).attention_projections
    useful = per_token * cfg.train.batch_size * cfg.data.seq_len // cfg.mesh.num_devices
    done = read.products.flops[ATTENTION] / useful
    passes = FORWARD[name] + 2
    p, m = cfg.mesh.stage, cfg.train.num_micro_batches
    bubble = (p - 1) / (m * chunks + p - 1)
    assert 1 - passes / done == pytest.approx(bubble) == pytest.approx(sizes.bubble)
    moved = [one for one in read.collectives if one.cargo == ACTIVATIONS]
    assert {(one.axes, one.kind) for one in moved} == {("stage", "collective-permute")}
    assert sum(one.num_bytes for one in moved) == theory.activations(cfg)


@pytest.mark.full
def test_1f1b_keeps_as_many_micro_batches_however_many_there_are():
    """Bytes that the compiler plans beside arguments and results, with 4 and with 32 micro-batches.

    "gpipe" keeps the input of each of them on each stage, "1f1b" three.
    """

    def temporary(name, micro_batches):
        _, step = compiled(name, micro_batches=micro_batches)
        return step.memory_analysis().temp_size_in_bytes

    grown = {name: temporary(name, 32) - temporary(name, 4) for name in FORWARD}
    cfg, _ = compiled(schedule.GPIPE)
    one = cfg.train.micro_batch_size * cfg.data.seq_len * cfg.model.d_model * 4
    # A stage keeps the inputs of 28 more works. The ends have half of them in either.
    assert grown[schedule.GPIPE] - grown[schedule.ONE_F_ONE_B] >= 27 * one
