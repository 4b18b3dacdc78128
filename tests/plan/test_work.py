"""Work, theory and time: what is computed from a program, against cases worked out by hand."""

from collections import Counter

import jax
import meshes
import pytest
import tiny

from moe_jax.parallel.compiling import QUICK
from moe_jax.plan import chips, estimate, flops, theory, work
from moe_jax.plan.compiling import compile_step
from moe_jax.plan.hlo import program
from moe_jax.plan.hlo.collectives import Collective
from moe_jax.plan.hlo.products import Products
from moe_jax.plan.hlo.program import Program

# A model whose rows are wide beside what a token's assignments say, in float32.
WIDE = {
    "model.d_model": 512,
    "model.repeats": 1,
    "model.dtype": "float32",
    "model.param_dtype": "float32",
    "data.seq_len": 16,
}


def made(found, unknown=(), loops=(), collectives=(), traffic=0):
    counted = Products(Counter(found), Counter(), Counter(unknown))
    return Program(counted, 0, tuple(collectives), Counter({"": traffic}), tuple(loops))


@pytest.fixture(scope="module")
def cfg():
    return tiny.build((1, 8, 1), WIDE)


def test_useful_work_is_three_passes_of_the_forward_flops(cfg):
    parts = {one.part: one.useful for one in work.compare(cfg, made({}), 1, 1)}
    tokens = cfg.train.batch_size * cfg.data.seq_len / 8
    whole = flops.train_per_token(cfg.model, cfg.data.seq_len) * tokens
    assert sum(parts.values()) == pytest.approx(whole, rel=1e-6)


def test_what_the_program_says_is_taken_as_it_is(cfg):
    (head,) = [one for one in work.compare(cfg, made({"head": 7}), 1, 1) if one.part == "head"]
    assert head.done == 7 and not head.is_estimate


def test_where_it_does_not_say_the_buffer_counts(cfg):
    found = {one.part: one for one in work.compare(cfg, made({}, unknown=["other"]), 5, 2)}
    experts = found["routed experts"]
    assert experts.done == round(2.5 * experts.useful) and experts.is_estimate
    assert found["head"].done == found["head"].useful
    # A kernel of another part says nothing of the experts.
    read = made({"routed experts": 7}, unknown=["attention scores"])
    found = {one.part: one for one in work.compare(cfg, read, 5, 2)}
    scores = found["attention scores"]
    assert found["routed experts"].done == 7 and scores.done == scores.useful


def test_what_kernels_say_of_all_rows_is_scaled_to_a_balanced_load(cfg):
    counted = Products(
        Counter({"routed experts": 100}), Counter(), Counter(), Counter({"routed experts": 80})
    )
    read = made({})._replace(products=counted)
    parts = work.compare(cfg, read, rows_held=40, rows_balanced=20, rows_computed=30)
    (experts,) = [one for one in parts if one.part == "routed experts"]
    assert experts.done == 20 + 60 and experts.is_estimate


def test_the_slowest_part_bounds_a_step_and_what_is_waited_for_comes_on_top():
    found = estimate.Estimate(
        compute=2.0,
        memory=1.0,
        network={"data": 1.5},
        waited=0.5,
        tokens_per_step=100,
        useful_seconds=1.0,
    )
    assert (found.step, found.bound) == (2.5, "compute")
    assert found.tokens_per_second == 40 and found.mfu == pytest.approx(0.4)
    slow = found._replace(network={"data": 1.0, "expert": 3.0})
    assert (slow.step, slow.bound) == (4.0, "network over expert")
    assert found._replace(memory=9.0).bound == "memory"


LATENT = {
    "model.attention": "latent",
    "model.num_kv_heads": 4,
    "model.attentions.latent.q_lora_rank": 32,
    "model.attentions.latent.kv_lora_rank": 32,
}


def test_every_projection_of_latent_attention_is_found_in_the_program():
    """Both matrices of each latent, and the output: three passes, and none of it is "other"."""
    cfg = tiny.build(changes=WIDE | LATENT | {"model.period": ("dense",), "model.d_model": 64})
    with jax.set_mesh(meshes.make(1, 1, 1)):
        text = compile_step(cfg, QUICK).compiled.as_text()
    found = program.read(text, cfg.mesh._asdict())
    parts = {one.part: one for one in work.compare(cfg, found, 1, 1)}
    projections = parts["attention projections"]
    assert projections.done == pytest.approx(projections.useful, rel=0.01)
    assert "other" not in parts or parts["other"].done < 0.01 * projections.done


SENT = {
    "capacity": {"model.moe.dispatcher": "capacity"},
    "dropless, accumulated": {"train.micro_batch_size": 8, "model.remat": "dispatch"},
}


@pytest.mark.parametrize("name", SENT)
def test_expert_parallelism_sends_what_theory_says(name):
    """Within 5 %: the rest says where tokens go."""
    cfg = tiny.build((1, 8, 1), WIDE | SENT[name])
    with jax.set_mesh(meshes.make(1, 8, 1)):
        compiled = compile_step(cfg, QUICK).compiled
    read = program.read(compiled.as_text(), cfg.mesh._asdict())
    sent = sum(one.num_bytes for one in read.collectives if one.cargo == "tokens")
    assert sent == pytest.approx(theory.tokens(cfg), rel=0.05)
    # The formula that everybody writes: tokens x k x d x width x capacity, of which 7 of 8 parts
    # come from others, out and back, forward and backward.
    if name == "capacity":
        tokens = cfg.train.batch_size * cfg.data.seq_len // 8
        plain = 4 * tokens * 2 * 512 * 4 * 1.25 * 7 / 8
        assert theory.tokens(cfg) == pytest.approx(plain, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("remat", ["none", "dispatch", "dots", "full"])
@pytest.mark.parametrize("micro", [8, 16])
@pytest.mark.parametrize("dispatcher", ["capacity", "dropless"])
def test_theory_holds_for_every_way_to_recompute(dispatcher, micro, remat):
    changes = {
        "model.moe.dispatcher": dispatcher,
        "train.micro_batch_size": micro,
        "model.remat": remat,
    }
    cfg = tiny.build((1, 8, 1), WIDE | changes)
    with jax.set_mesh(meshes.make(1, 8, 1)):
        compiled = compile_step(cfg, QUICK).compiled
    read = program.read(compiled.as_text(), cfg.mesh._asdict())
    sent = sum(one.num_bytes for one in read.collectives if one.cargo == "tokens")
    assert sent == pytest.approx(theory.tokens(cfg), rel=0.05)


def test_network_time_is_that_of_every_collective():
    cfg = tiny.build((1, 8, 1), WIDE)
    mesh = meshes.make(1, 8, 1)
    sums = Collective("all-reduce", "expert", 8, "gradients and sums", False, 1, 450 * 10**6)
    hidden = sums._replace(is_async=True)
    found = made({"head": 989_400_000}, collectives=[sums, hidden], traffic=3_352_000)
    chip = chips.CHIPS["h100"]._replace(peak={"float32": 989.4e12})
    parts = work.compare(cfg, found, 1, 1)
    time = estimate.estimate(cfg, found, parts, mesh, chip)
    assert time.compute == pytest.approx(1e-6) and time.memory == pytest.approx(1e-6)
    # A millisecond each over NVLink; one of them is waited for.
    assert time.network == {"expert": pytest.approx(2e-3)} and time.waited == pytest.approx(1e-3)
