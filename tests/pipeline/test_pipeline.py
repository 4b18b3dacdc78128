"""A pipeline computes what one device computes: loss, every token's loss, routing, sums, gradients,
router state over steps, and checkpoints that move between meshes.

In float64, beside the reference of `verify`: one large batch, a loop over the layers.
"""

import pytest
import tiny
from suites import normal

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import ONE, Lengths
from moe_jax.verify import shrink, states
from moe_jax.verify.program import Program
from moe_jax.verify.run import against, evaluated, reference

STEPS = 2
# A router whose state moves, a capacity that drops, dropout, balance losses that count, blocks
# before and after the repeats, a further token that is predicted behind them, and a tied embedding,
# whose gradient comes from both ends.
TINY = {
    "model.prefix": ("dense",),
    "model.suffix": ("moe",),
    "model.repeats": 4,
    "model.tie_embeddings": True,
    "model.dropout": 0.1,
    "model.moe.router": "sigmoid",
    "model.moe.dispatcher": "capacity",
    "model.moe.dispatchers.capacity.factor": 1.0,
    "model.moe.losses.balance": 0.1,
    "model.moe.losses.z": 0.01,
    "optim.warmup_steps": 1,
    "optim.learning_rate": 1e-2,
    "model.kinds.decoder.mtp_depths": 1,
}
LAYOUT = {"model.scan": True, "train.micro_batch_size": 4}
# Mesh, schedule, chunks, other keys. The first are those of the normal suite: both schedules, with
# chunks and without, with other axes and without.
CASES = {
    "2x2x1x1x2 interleaved": (Lengths(2, 2, 1, 1, 2), "gpipe", 2, {}),
    "2x1x1x1x1 1f1b": (Lengths(stage=2), "1f1b", 1, {}),
    "2x1x1x1x1 gpipe": (Lengths(stage=2), "gpipe", 1, {}),
    "4x1x2x1x1 1f1b": (Lengths(4, 1, 2, 1, 1), "1f1b", 1, {}),
    "4x1x1x1x1 gpipe remat": (Lengths(stage=4), "gpipe", 1, {"model.remat": "full"}),
    "2x1x2x1x2 interleaved 1f1b": (Lengths(2, 1, 2, 1, 2), "1f1b", 2, {}),
    "2x2x2x1x1 1f1b dropless": (
        Lengths(2, 2, 2, 1, 1),
        "1f1b",
        1,
        {"model.moe.dispatcher": "dropless", "model.remat": "attention"},
    ),
}
NORMAL = tuple(CASES)[:2]


def raw_of(schedule="gpipe", chunks=1, changes=None):
    keys = {"train.pipeline_schedule": schedule, "train.pipeline_chunks": chunks}
    return tiny.raw(TINY | LAYOUT | keys | (changes or {}))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Returns changes -> (the reference, a directory with its first state)."""
    made = {}

    def make(changes):
        key = tuple(changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("sound")
            one = reference(tiny.raw(TINY | changes), STEPS)
            states.write(one.program, one.begin, folder / "begin")
            made[key] = one, folder
        return made[key]

    return make


@pytest.mark.parametrize("name", normal(NORMAL, CASES))
def test_a_pipeline_equals_one_device(float64, sound, tmp_path, name):
    lengths, schedule, chunks, changes = CASES[name]
    one, folder = sound({key: x for key, x in changes.items() if key != "model.remat"})
    program = Program(raw_of(schedule, chunks, changes), lengths).compile()
    begin = states.read(program, folder / "begin")
    end, worst, first = against(one, program, begin)
    assert first is None, first
    assert {"gradients", "sums", "state", "counts", "forward"} <= worst.keys()
    # From the mesh of stages to one device.
    assert states.unequal(program, end, one.program, tmp_path / "there") == []


@pytest.mark.full
def test_a_pipeline_evaluates_as_one_device(float64, sound):
    one, folder = sound({})
    program = Program(raw_of(), Lengths(2, 2, 1, 1, 1))
    check = evaluated(one, program, states.read(program, folder / "begin"))
    assert check.sound, check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.scan": False}, "splits stacked layers: set model.scan = True"),
        ({"model.repeats": 3}, "model.repeats (3) must be divisible by mesh.stage x"),
        ({"train.pipeline_chunks": 4}, "train.pipeline_chunks (2 x 4)"),
        ({"train.micro_batch_size": 16}, "the micro-batches of a step (1 = "),
    ],
)
def test_what_cannot_be_a_pipeline_is_one_line(changes, message):
    raw = raw_of(changes=changes)
    with pytest.raises(UserError) as error:
        config.build({**raw, "mesh": Lengths(stage=2).written()}, 2)
    assert message in str(error.value) and "\n" not in str(error.value)
    # On one device nothing of it is refused.
    assert shrink.refusal(raw_of(), ONE) == ""
