"""What the search of plans tries, and what its formula says of a pipeline."""

from pathlib import Path

import jax
import pytest

from moe_jax import config
from moe_jax.config import command_line
from moe_jax.parallel import mesh
from moe_jax.pipeline.schedule import Schedule
from moe_jax.plan import card, memory_theory, search
from moe_jax.plan.compiling import abstract_state
from moe_jax.train_step import make_model

STAGES, MICRO_BATCHES, REPEATS = 2, 8, 4


@pytest.fixture(scope="module")
def ranked():
    """The candidates of a model of four equal layers, with two stages and without."""
    changes = [
        f"--config.mesh.stage={STAGES}",
        f"--config.model.repeats={REPEATS}",
        "--config.model.prefix=()",
        "--config.train.micro_batch_size=2",
    ]
    raw = command_line.read(Path("debug"), changes)
    return search.rank(raw, "cpu:2", jax.devices()[:2])


def one(ranked, stage):
    (found,) = (
        each
        for each in ranked
        if each.mesh.stage == stage
        and each.mesh.data * each.mesh.stage == 2
        and each.remat == "none"
        and each.dispatcher == "dropless 1.25"
    )
    return found


def test_stages_of_the_config_are_tried_beside_meshes_without(ranked):
    assert {each.mesh.stage for each in ranked} == {1, STAGES}
    assert {each.mesh.seq for each in ranked} == {1}


def test_a_pipeline_computes_in_its_bubble_and_once_more_forward(ranked):
    """Both have four passes over the blocks: two forward, because the loss of debug is a product of
    sums, and backward, which counts twice. A stage makes them in every tick, its bubble too.
    """
    sizes = Schedule(STAGES, MICRO_BATCHES)
    rows = one(ranked, 1).flops
    stages = one(ranked, STAGES).flops
    # The head works on every micro-batch once, without a bubble.
    assert rows < stages < rows * sizes.ticks / sizes.works


def test_a_stage_has_the_state_of_its_own_layers(ranked):
    """Parameters over `data` are gathered layer by layer, so both keep a half of them."""
    sizes = Schedule(STAGES, MICRO_BATCHES)
    by_data, by_stage = one(ranked, 1), one(ranked, STAGES)
    assert 0.5 < by_stage.memory / by_data.memory < 2
    assert search._blocks_at_once(by_stage.cfg) == REPEATS // STAGES
    # Inputs of all works, and what the ends hold.
    assert search._inputs_kept(by_stage.cfg) == sizes.works + 2 * sizes.groups
    assert search._inputs_kept(by_data.cfg) == 0


def test_memory_traffic_by_the_formula_is_near_the_compiled_program():
    """For a CPU, whose arrays of a block are those of an accelerator: within a factor of 1.5."""
    changes = ["--config.model.remat=none", "--config.mesh.data=1", "--config.mesh.expert=1"]
    changes += ["--config.mesh.model=1", "--config.simulate_devices=1"]
    cfg = config.build(command_line.read(Path("debug"), changes), 1)
    with jax.set_mesh(mesh.make(cfg.mesh, jax.devices()[:1])):
        found = card.card(cfg)
    compiled = found.compiled.program.memory_traffic.total()
    assert 1 / 1.5 < found.expected_traffic / compiled < 1.5


@pytest.mark.parametrize("name", ["article", "translation", "vision"])
def test_memory_traffic_is_not_known_of_models_with_other_matrices(name):
    cfg = config.build(command_line.read(Path(name), []), 8)
    with jax.set_mesh(mesh.make(cfg.mesh, jax.devices()[: cfg.mesh.num_devices])):
        state = abstract_state(cfg, make_model(cfg.model))
        assert memory_theory.memory_traffic(cfg, state, 1) == 0
