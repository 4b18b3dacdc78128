"""Multi-token prediction: equations 21 to 25 of DeepSeek-V3 document by document, the same on every
mesh, and what it leaves as it was.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
from verify_cases import references

from moe_jax import evaluate, train_step
from moe_jax.checkpoint import flat
from moe_jax.config import causality
from moe_jax.errors import UserError
from moe_jax.models.decodable import for_decoding
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches
from moe_jax.moe.layer import Batch
from moe_jax.moe.losses import LOSSES
from moe_jax.parallel.mesh import Lengths
from moe_jax.plan import flops
from moe_jax.tasks import contract
from moe_jax.tasks.lm import task as lm
from moe_jax.verify import states
from moe_jax.verify.alone import further_losses
from moe_jax.verify.program import Program
from moe_jax.verify.run import against, evaluated

# Steps are made, and optax mixes dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

AT = "model.kinds.decoder"
DEPTHS = 2
# Every token goes its own way, so that documents may be computed one by one.
FREE = {
    "model.repeats": 1,
    "data.seq_len": 8,
    f"{AT}.mtp_depths": DEPTHS,
    f"{AT}.mtp_weight": 0.5,
    **{f"model.moe.losses.{name}": 0.0 for name in LOSSES},
}


@pytest.fixture(scope="module", autouse=True)
def in_float64():
    """All in float64, where equality can be proven."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def program(in_float64):
    one = tiny.Program((1, 1, 1), FREE)
    with jax.set_mesh(one.mesh):
        state = one.init(jax.random.key(0))
    return one, state


def batch_of(cfg):
    """Two documents in each row, some tokens that are not learned, some padding."""
    batch = tiny.batch(cfg)
    quiet_BS = np.random.default_rng(1).random(batch.tokens_BS.shape) < 0.2
    return batch._replace(quiet_BS=quiet_BS.astype(np.int32))


# Equations 21 to 25.


def documents_of(batch):
    """(ids, targets, learned) of every document."""
    found = []
    for row, segment_S in enumerate(batch.segment_BS):
        for number in (1, 2):
            places = np.flatnonzero(segment_S == number)
            if len(places):
                arrays = (batch.tokens_BS, batch.targets_BS, batch.quiet_BS == 0)
                found.append(tuple(z[row, places] for z in arrays))
    return found


def rms_norm(x, scale, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def mean_nll(logits, target, learned):
    """(sum, number) of the losses of some places."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(log_p[np.arange(len(target)), target] * learned).sum(), learned.sum()


def by_the_paper(program, state, batch):
    """The loss of every depth, 0 that of the next token; blocks alone are the product's."""
    cfg, params = program.cfg.model, jax.device_get(state.params)
    documents, length = documents_of(batch), batch.tokens_BS.shape[1]
    bound = program.model.bind(state.params, state.router_state)
    embed_VD, head_DV = params["ends"]["embed"], params["ends"]["head"]
    sizes = np.array([len(ids) for ids, _, _ in documents])
    place = np.arange(length, dtype=np.int32)

    def rows(k):
        """A Batch with a document in each row, as far as depth k has places."""
        id_NS = np.zeros((len(documents), length), np.int32)
        for row, (ids, _, _) in enumerate(documents):
            id_NS[row, : len(ids[k:])] = ids[k:]
        segment_NS = (place < sizes[:, None] - k).astype(np.int32)
        position_NS = np.broadcast_to(place, segment_NS.shape)
        numbers = np.arange(len(documents), dtype=np.int32)
        arrays = (id_NS, position_NS, segment_NS, numbers)
        return Batch(*(meshes.put(z, "batch") for z in arrays))

    def loss(h_NSD, k):
        sums = [
            mean_nll(h_SD[: len(ids[k:])] @ head_DV, targets[k:], learned[k:])
            for h_SD, (ids, targets, learned) in zip(h_NSD, documents, strict=True)
        ]
        total, number = np.sum(sums, axis=0)
        return total / number

    key = jax.random.key(0)
    h_NSD = np.asarray(jax.jit(lambda b: bound.hidden(b, key, False)[0].x_BSD)(rows(0)))
    losses = [loss(h_NSD, 0)]
    for k in range(1, DEPTHS + 1):
        join = params["mtp"]["joins"][k - 1]
        x_NSD = np.zeros_like(h_NSD)
        for row, (ids, _, _) in enumerate(documents):
            num = len(ids[k:])
            e = rms_norm(embed_VD[ids[k:]] * cfg.d_model**0.5, join["embed_norm_scale"])
            h = rms_norm(h_NSD[row, :num], join["hidden_norm_scale"])
            both = np.concatenate([e, h], -1)
            x_NSD[row, :num] = both @ join["w_join"].reshape(2 * cfg.d_model, cfg.d_model)
        block = bound.mtp.prefix[k - 1]
        run = jax.jit(lambda x, b, block=block: block(x, b, key, False)[0])
        y_NSD = np.asarray(run(meshes.put(x_NSD, "batch"), rows(k)))
        h_NSD = rms_norm(y_NSD, join["out_norm_scale"])
        losses.append(loss(h_NSD, k))
    return losses


def test_losses_are_those_of_the_paper_document_by_document(program):
    one, state = program
    batch = batch_of(one.cfg)

    def moved(x):
        # What begins at one, so that it could not be forgotten.
        return jnp.where(x == 1, 1.1, x)

    with jax.set_mesh(one.mesh):
        state = state._replace(params=jax.tree.map(moved, state.params))
        want = by_the_paper(one, state, batch)
        _, metrics = one.step(state, tiny.put(one.cfg, batch))
    have = [metrics["nll"], *(metrics[f"mtp_{k}_nll"] for k in range(1, DEPTHS + 1))]
    np.testing.assert_allclose(have, want, rtol=1e-11)
    # Equation 25.
    np.testing.assert_allclose(metrics["loss"], want[0] + 0.5 * np.mean(want[1:]), rtol=1e-11)


def test_a_row_without_a_further_token_has_no_loss_and_no_nan(program):
    one, state = program
    batch = tiny.batch(one.cfg)
    index = np.arange(8, dtype=np.int32)[None]
    # Documents of one token, which have no token ahead.
    alone = batch._replace(segment_BS=np.broadcast_to(index + 1, (16, 8)).astype(np.int32))
    with jax.set_mesh(one.mesh):
        new, metrics = one.step(state, tiny.put(one.cfg, alone))
    assert metrics["mtp_1_nll"] == metrics["mtp_2_nll"] == 0
    assert metrics["loss"] == metrics["nll"] > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(new.params)))


# What it leaves as it was.


def test_the_model_of_the_next_token_is_the_same_bit_for_bit(program):
    """First values, losses of the next token and its logits are those without further tokens."""
    one, state = program
    plain = tiny.Program((1, 1, 1), FREE | {f"{AT}.mtp_depths": 0, f"{AT}.mtp_weight": 0.3})
    batch = tiny.batch(one.cfg)

    def losses(program, state):
        def forward(params, router_state, rows):
            bound = program.model.bind(params, router_state)
            return lm.losses(bound, rows, jax.random.key(0), False).nll

        return jax.jit(forward)(state.params, state.router_state, tiny.put(program.cfg, batch))

    with jax.set_mesh(one.mesh):
        begin = plain.init(jax.random.key(0))
        ours, theirs = (flat.flatten(jax.device_get(z.params)) for z in (state, begin))
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)
        assert {name.split("/")[0] for name in ours.keys() - theirs.keys()} == {"mtp"}
        np.testing.assert_array_equal(losses(one, state), losses(plain, begin))


def test_the_loss_of_a_depth_does_not_see_the_token_that_it_predicts(program):
    """Of one document, token 5 is read by depth k from place 5 - k on."""
    one, state = program
    batch = tiny.batch(one.cfg)
    batch = batch._replace(segment_BS=np.ones_like(batch.segment_BS))
    tokens_BS = batch.tokens_BS.copy()
    tokens_BS[:, 5] = (tokens_BS[:, 5] + 1) % 64

    def losses(batch):
        bound = one.model.bind(state.params, state.router_state)
        return {
            k: z.nll for k, z in lm.losses(bound, batch, jax.random.key(0), True).further.items()
        }

    with jax.set_mesh(one.mesh):
        run = jax.jit(losses)
        pair = (batch, batch._replace(tokens_BS=tokens_BS))
        before, after = (jax.device_get(run(tiny.put(one.cfg, z))) for z in pair)
    for k in range(1, DEPTHS + 1):
        moved_S = (before[f"mtp_{k}"] != after[f"mtp_{k}"]).any(0)
        assert not moved_S[: 5 - k].any() and moved_S[5 - k : 8 - k].all()
    assert not causality.sees(one.cfg.model).future


def test_decoding_does_without(program):
    """Token by token as the full pass, from parameters that have further blocks."""
    one, state = program
    cfg = for_decoding(one.cfg.model)
    id_BS = np.random.default_rng(0).integers(0, 64, (2, 6)).astype(np.int32)

    def batch(first, last):
        position_BS = np.tile(np.arange(first, last, dtype=np.int32), (2, 1))
        arrays = (id_BS[:, first:last], position_BS, np.ones_like(position_BS))
        placed = [meshes.put(z, "batch") for z in (*arrays, np.arange(2, dtype=np.int32))]
        return Batch(*placed)

    with jax.set_mesh(one.mesh):
        bound = make_model(cfg).bind(state.params, state.router_state)
        full = jax.jit(lambda b: bound(b, jax.random.key(0), False)[0])(batch(0, 6))
        caches, cached = empty_caches(cfg, 2, 6), jax.jit(bound.cached)
        for place in range(6):
            logits, caches = cached(batch(place, place + 1), caches)
            np.testing.assert_allclose(logits[:, 0], full[:, place], atol=1e-11)


# Evaluation.


def test_an_evaluation_has_the_figures_of_each_depth(program):
    one, state = program
    batch = tiny.batch(one.cfg)

    def sums(params, batch):
        bound = one.model.bind(params, state.router_state)
        of_batch = contract.evaluate(lm.TASK, bound, batch, tiny.DATA)
        losses = lm.losses(bound, batch, jax.random.key(0), False)
        return of_batch, losses.further, losses.nll

    with jax.set_mesh(one.mesh):
        total, further, nll = jax.device_get(jax.jit(sums)(state.params, tiny.put(one.cfg, batch)))
    total = jax.tree.map(lambda z: np.asarray(z, np.float64), total)
    figures = evaluate.summary(lm.TASK, total, tiny.DATA)
    # The loss of a model stays that of the next token.
    assert figures["loss"] == pytest.approx(nll[batch.segment_BS > 0].mean())
    for name, one_depth in further.items():
        counts = one_depth.weight > 0
        assert figures[f"{name}/loss"] == pytest.approx(one_depth.nll[counts].mean())
        assert figures[f"{name}/accuracy"] == one_depth.correct[counts].mean()


# Meshes, accumulation, split rows, a pipeline: what `verify` compares.

GRID = {
    "model.repeats": 1,
    "model.dropout": 0.1,
    "model.head_dim": 4,
    "model.tie_embeddings": True,
    "model.moe.router": "sigmoid",
    "model.moe.dispatcher": "capacity",
    "model.moe.dispatchers.capacity.factor": 1.0,
    "model.moe.losses.balance": 0.1,
    "optim.learning_rate": 1e-2,
    "optim.warmup_steps": 1,
    "data.seq_len": 16,
    f"{AT}.mtp_depths": DEPTHS,
}
# Blocks that repeat, the mesh, other keys. In the normal suite tests/pipeline has further tokens.
LAYOUTS = {
    "2x2x2 accumulated": (
        1,
        Lengths(data=2, expert=2, model=2),
        {"train.micro_batch_size": 4},
    ),
    "a pipeline, split rows": (
        2,
        Lengths(stage=2, expert=2, seq=2),
        {"model.scan": True, "model.remat": "full", "train.micro_batch_size": 4},
    ),
    "experts, split rows, chunks of logits": (
        2,
        Lengths(expert=4, seq=2),
        {"model.loss_chunk": 7, "train.micro_batch_size": 8, "model.scan": True},
    ),
}


@pytest.fixture(scope="module")
def one_device(in_float64, tmp_path_factory):
    """Returns changes -> (the reference, a directory with its first state)."""
    return references(tmp_path_factory, GRID)


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mesh_changes_nothing(name, one_device):
    """Loss, every loss of a further token, sums, gradients, state and a checkpoint."""
    repeats, lengths, changes = LAYOUTS[name]
    repeated = {"model.repeats": repeats}
    one, folder = one_device(tuple(repeated.items()))
    program = Program(tiny.raw(GRID | repeated | changes), lengths).compile()
    begin = states.read(program, folder / "begin")
    end, worst, first = against(one, program, begin)
    assert first is None, first
    assert worst["tokens"].sound and set(one.probes[0].further) == {"mtp_1", "mtp_2"}
    # The blocks of further tokens count as MoE layers, behind the others.
    assert one.probes[0].sums["counts"].shape[0] == repeats + DEPTHS
    assert not states.unequal(program, end, one.program, folder / name.replace(" ", "_"))
    if not name.startswith("2x2x2"):
        assert evaluated(one, program, begin).sound


def test_verify_checks_the_denominator_of_each_depth(program):
    one, state = program

    def losses(params, router_state, batch):
        bound = one.model.bind(params, router_state)
        further = lm.losses(bound, batch, jax.random.key(0), True).further
        return {name: depth.nll for name, depth in further.items()}

    def step(factor, now, batch):
        with jax.set_mesh(one.mesh):
            rows = tiny.put(one.cfg, batch)
            _, metrics = one.step(now, rows)
            further = jax.device_get(jax.jit(losses)(now.params, now.router_state, rows))
        wrong = {f"{name}_nll": factor * metrics[f"{name}_nll"] for name in further}
        return now, SimpleNamespace(further=further, metrics=metrics | wrong)

    for factor, is_sound in ((1, True), (0.97, False)):
        proof = SimpleNamespace(cfg=one.cfg, task=lm.TASK, step=functools.partial(step, factor))
        (check,) = further_losses(proof, state)
        assert check.sound == is_sound


# Plans.


def test_parameters_and_flops_are_those_of_the_model():
    """D 16, V 64, row of 8: each depth has a block as the last one, 2 D^2 weights and 3 norms, and
    the head once more.
    """
    with_depths, plain = (
        tiny.build(changes={"model.repeats": 1, f"{AT}.mtp_depths": depths}).model
        for depths in (DEPTHS, 0)
    )
    longer = tiny.build(changes={"model.repeats": 1 + DEPTHS}).model
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, _ = jax.eval_shape(train_step.make_model(with_depths).init, jax.random.key(0))
    counts, wide = flops.parameters(with_depths), flops.parameters(longer)
    assert counts.total == sum(x.size for x in jax.tree.leaves(params))
    joins = DEPTHS * 2 * 16**2
    assert counts == wide._replace(norms=wide.norms + DEPTHS * 3 * 16, joins=joins)
    have, alike = (flops.forward_per_token(cfg, 8) for cfg in (with_depths, longer))
    head = 2 * 16 * 64
    assert have == alike._replace(head=(1 + DEPTHS) * head, joins=2 * joins)
    assert flops.parameters(plain).joins == flops.forward_per_token(plain, 8).joins == 0


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{AT}.mtp_weight": 0.1},
            f"{AT}.mtp_weight = 0.1 does nothing, because {AT}.mtp_depths is 0: set "
            f"{AT}.mtp_depths=1, or leave the key alone",
        ),
        (
            {f"{AT}.mtp_depths": 8},
            f"{AT}.mtp_depths (8) must be below data.seq_len (8): a row has no token so far ahead",
        ),
        (
            {f"{AT}.mtp_depths": 1, f"{AT}.bidirectional_prefix": True},
            f"{AT}.mtp_depths (1) must be 0 with {AT}.bidirectional_prefix = True: a token that "
            "sees its whole prefix sees what it is to predict",
        ),
        (
            {f"{AT}.mtp_depths": 1, "model.period": ("depth:moe",)},
            f"{AT}.mtp_depths (1) needs a last block that all tokens go through, and it is "
            '"depth:moe": end model.suffix with another block',
        ),
        ({f"{AT}.mtp_depths": -1}, f"{AT}.mtp_depths = -1 must be at least 0"),
    ],
)
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(UserError) as error:
        tiny.build(changes=changes)
    assert message in str(error.value) and "\n" not in str(error.value)
