"""`verify` finds every planted fault of tests/mutations/, and which of them a loss curve would
have shown.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import mutations
import numpy as np
import pytest
import tiny
from verify_cases import BREAKABLE, references

from moe_jax.commands.verify import COLUMNS
from moe_jax.parallel.mesh import ONE, Lengths
from moe_jax.tasks.lm.task import random as batch
from moe_jax.verify import alone, compare, shrink, states
from moe_jax.verify.program import Program
from moe_jax.verify.run import against, evaluated, first_values

MESH = Lengths(data=2, expert=2, model=2)
MESHES = {
    "mesh": MESH,
    "context": Lengths(expert=2, seq=2, model=2),
    "stages": Lengths(stage=2, data=2),
}
# What a fault needs that is there in a layout alone, by `where`.
LAYOUTS = {
    "layout": {"train.micro_batch_size": 8},
    "stages": {"train.micro_batch_size": 4, "model.scan": True},
}
CURVE_STEPS = 50
HIDDEN = 0.05  # a curve whose end is no farther off than this tells nobody


def shrunk(changes):
    return tiny.raw(BREAKABLE | changes)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Returns changes -> (the reference of the sound code, a directory with its first state)."""
    return references(tmp_path_factory, BREAKABLE)


@pytest.fixture(scope="module")
def planted(request):
    """name -> a future of the program with that fault (None: jax refused to trace it).

    Traced one by one, compiled two at a time.
    """
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.originalname == FAULTS
    }
    programs = {}
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        for name, mutation in mutations.MUTATIONS.items():
            if name not in chosen or mutation.where in PARTS:
                continue
            with patch.context() as one:
                mutation.plant(one)
                programs[name] = submit(pool, shrunk(mutation.changes), mutation.where)
        yield programs


def submit(pool, raw, where):
    raw = shrink.changed(raw, LAYOUTS.get(where, {}))
    program = Program(raw, MESHES.get(where, ONE))
    try:
        return pool.submit(program.compile, program.lower())
    except ValueError:
        return None


def on_mesh(one, folder):
    """(the program of a reference on MESH, its first state there)"""
    program = Program(one.program.raw, MESH)
    return program, states.read(program, folder / "begin")


# What compiles its own small programs: (reference, folder with its first state) -> checks.
PARTS = {
    "arithmetic": lambda one, folder: alone.against_reference(one.program),
    "attention": lambda one, folder: [alone.attention(256, one.program.cfg.model)],
    "evaluation": lambda one, folder: [evaluated(one, *on_mesh(one, folder))],
    "first values": lambda one, folder: [first_values(one, Program(one.program.raw, MESH))],
}
FAULTS = "test_every_fault_is_found"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full) if mutation.full else name
        for name, mutation in mutations.MUTATIONS.items()
    ],
)
def test_every_fault_is_found(float64, monkeypatch, sound, planted, name):
    mutation = mutations.MUTATIONS[name]
    one, folder = sound(tuple(mutation.changes.items()))
    if mutation.where in PARTS:
        mutation.plant(monkeypatch)
        found = {check.claim for check in PARTS[mutation.where](one, folder) if not check.sound}
    elif planted[name] is None:
        found = {"tracing"}
    elif mutation.where == "alone":
        program = planted[name].result()
        checks = [alone.mean_loss(program, one.begin), *alone.router_updates(program, one.begin)]
        checks += alone.changes(program, one.begin)
        found = {check.claim for check in checks if not check.sound}
    else:
        program = planted[name].result()
        _, worst, first = against(one, program, states.read(program, folder / "begin"))
        found = {check for check, deviation in worst.items() if not deviation.sound}
        assert first.check in found
    assert mutation.found_by in found


def test_nothing_is_found_where_nothing_is_wrong(float64, sound):
    """The other half of the claim, on one device; tests/verify/test_verify.py has it on meshes."""
    one, _ = sound(())
    for check in alone.checks(one.program, one.begin):
        assert check.sound, check
        assert (
            check.judged or "document" in check.claim
        )  # capacity drops here, and documents of a row share it


def curve(raw, shape, begin):
    """Losses on sequences that count upwards, which the model learns."""
    program = Program(raw, shape).compile()
    now, seen = (
        jax.tree.map(
            lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, begin(program)
        ),
        [],
    )
    for step in range(CURVE_STEPS):
        inputs = batch(program.cfg, step)
        start = inputs.tokens_BS[:, :1]
        tokens = (
            start + np.arange(inputs.tokens_BS.shape[1], dtype=np.int32)[None]
        ) % program.cfg.model.vocab_size
        now, probe = program.step(
            now, inputs._replace(tokens_BS=tokens, targets_BS=(tokens + 1) % 64)
        )
        seen.append(float(probe.metrics["loss"]))
    return np.array(seen)


@pytest.mark.full
def test_what_a_loss_curve_would_have_shown(float64, monkeypatch, sound, capsys):
    """The table of docs/verify.md, in Markdown: the mean loss of the last ten steps without the
    fault and with it.

    Run with -s to see it.
    """
    hidden, learns = [], []

    def say(text):
        with capsys.disabled():
            print(text, flush=True)

    say(f"\n{HEAD}")
    for name, mutation in mutations.MUTATIONS.items():
        cells = row(name, mutation)
        if reason := not_trained(mutation):
            say(line(*cells, "", "", reason))
            continue
        right = curve_of(mutation, sound)
        learns.append(right[-10:].mean() < 0.7 * right[0])
        with monkeypatch.context() as patch:
            mutation.plant(patch)
            try:
                wrong = curve_of.__wrapped__(mutation, sound)
            except ValueError:
                say(line(*cells, "", "", "cannot run"))
                continue
        ends = right[-10:].mean(), wrong[-10:].mean()
        difference = abs(ends[1] / ends[0] - 1)
        hidden += [name] if difference < HIDDEN else []
        judged = f"{difference:.1%}, {'hidden' if difference < HIDDEN else 'visible'}"
        say(line(*cells, *(f"{end:.4f}" for end in ends), judged))
    assert all(learns), "the sound model must learn for its curve to say anything"
    assert len(hidden) >= 3


HEAD = """| fault | reported | found by | loss without | with | |
|---|---|---|---|---|---|"""


def line(*cells):
    return f"| {' | '.join(cells)} |"


def row(name, mutation):
    """The cells of the table of docs/verify.md that need no run."""
    found_by = COLUMNS.get(mutation.found_by, mutation.found_by)
    if found_by == "tracing":
        found_by = "jax refuses to trace it"
    if mutation.where == "layout":
        found_by += " (row 1x1x1)"
    return name, mutation.reported or "-", found_by


def not_trained(mutation):
    """Why a training run on a CPU does not have a fault; "" = it has."""
    if mutation.plant is mutations.dispatch.kernel_without_gates:
        return "no CPU runs it"
    reasons = {"attention": "not at this length", "evaluation": "not trained"}
    return reasons.get(mutation.where, "")


def by_changes(function):
    """Keeps the results of a function of (mutation, sound) for mutations with one config."""
    kept = {}

    @functools.wraps(function)
    def cached(mutation, sound):
        apart = ("layout", "first values", "context", "stages")
        own = mutation.where if mutation.where in apart else ""
        key = repr(sorted(mutation.changes.items())), own
        if key not in kept:
            kept[key] = function(mutation, sound)
        return kept[key]

    return cached


@by_changes
def curve_of(mutation, sound):
    """The losses of the config of a fault, in float32 on its mesh."""
    narrow = {"model.dtype": "float32", "model.param_dtype": "float32"}
    changes = mutation.changes | narrow | LAYOUTS.get(mutation.where, {})

    def begin(program):
        if mutation.where == "first values":
            return program.initial()
        _, folder = sound(tuple(mutation.changes.items()))
        # In float64, as it was written.
        raw = shrink.changed(shrunk(mutation.changes), LAYOUTS.get(mutation.where, {}))
        return states.read(Program(raw, program.lengths), folder / "begin")

    return curve(shrunk(changes), MESHES.get(mutation.where, MESH), begin)


def test_the_table_of_the_docs_has_every_fault():
    page = (Path(__file__).parents[2] / "docs/verify.md").read_text()
    for name, mutation in mutations.MUTATIONS.items():
        assert f"\n{line(*row(name, mutation))[:-1]}" in page, name


def test_deviations_name_the_worst_and_the_first():
    """Hand-made probes: the loss deviates at step 1 by 1e-3, the gradient of `b` at step 0 by half
    of its largest entry.
    """
    from moe_jax.verify.program import Probe

    def probe(loss, b):
        counts = {"counts": np.ones((1, 2, 4)), "dropped": np.zeros((1, 2))}
        return Probe(
            loss, {}, np.zeros((2, 3)), counts, {}, {"a": np.ones(3), "b": np.array([2.0, b])}
        )

    want, have = [probe(1.0, 1.0), probe(1.0, 1.0)], [probe(1.0, 2.0), probe(1.001, 1.0)]
    worst, first = compare.deviations(
        want, have, {"params/a": np.ones(2)}, {"params/a": np.array([1.0, np.nan])}
    )
    assert first == compare.Deviation("gradients", 0.5, "b", 0)
    assert worst["forward"].step == 1 and worst["forward"].value == pytest.approx(1e-3)
    assert worst["counts"].sound and not worst["state"].sound and worst["state"].where == "params/a"
