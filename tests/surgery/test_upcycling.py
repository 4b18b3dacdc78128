"""`convert upcycle`: how hidden units are dealt out, which routers keep the function, and that what
comes out trains on.
"""

from types import SimpleNamespace

import jax
import meshes
import numpy as np
import pytest
import surgery_cases
import tiny

from moe_jax.__main__ import main as entry
from moe_jax.commands import fsck
from moe_jax.commands.conversions.told import PROMISED
from moe_jax.errors import UserError
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sizes
from moe_jax.run import open_run
from moe_jax.surgery import snapshot, upcycling
from moe_jax.surgery.upcycle import Asked, upcycled
from moe_jax.surgery.upcycling import Change, Shares
from moe_jax.surgery.weights import gaps

SMALL = {"model.period": ("dense",), "model.repeats": 2, "model.ffn_hidden": 24}
SMALL |= {"data.seq_len": 16}
STILL = Change(0.0, 0.0, 0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run that stopped half-way."""
    return surgery_cases.write(tmp_path_factory.mktemp("dense"), SMALL)


def moe(experts, width, shared=0):
    return SimpleNamespace(num_experts=experts, expert_hidden=width, shared_width=shared)


def test_hidden_units_are_dealt_out():
    assert upcycling.shares(24, moe(4, 24)) == Shares(0, 1, 24)
    assert upcycling.shares(24, moe(6, 8)) == Shares(0, 3, 8)
    assert upcycling.shares(24, moe(4, 8, 8)) == Shares(8, 2, 8)
    assert upcycling.shares(24, moe(4, 5, 24)) == Shares(24, 0, 5)
    for args, hint in (
        ((4, 16), "one of 24, 12, 6"),
        ((4, 8), "24, 12, 6"),
        ((4, 8, 32), "at most"),
    ):
        with pytest.raises(UserError, match=hint):
            upcycling.shares(24, moe(*args))


def test_copies_noise_and_drop_by_hand():
    rng = np.random.default_rng(0)
    w_in, w_out = rng.normal(size=(3, 2, 8)), rng.normal(size=(8, 3))
    made = upcycling.experts(w_in, w_out, 4, Shares(2, 2, 3))
    np.testing.assert_array_equal(made["w_in"][3], w_in[:, :, 5:8])
    np.testing.assert_array_equal(made["w_out"][2], w_out[2:5])
    dropped = upcycling.changed(made, "a", Change(0.0, 1 / 3, 0))
    for expert in range(4):
        moved = (dropped["w_out"][expert] != made["w_out"][expert]).any(1)
        # The same unit in all matrices of an expert, and one of three.
        assert moved.sum() == 1
        np.testing.assert_array_equal(
            (dropped["w_in"][expert] != made["w_in"][expert]).any((0, 1)), moved
        )
    noisy = upcycling.changed(made, "a", Change(0.5, 0.0, 0))
    change = noisy["w_in"] - made["w_in"]
    assert 0.3 < change.std() / made["w_in"].std() < 0.7 and (change != 0).all()
    again = upcycling.changed(made, "a", Change(0.5, 0.0, 0))
    np.testing.assert_array_equal(noisy["w_in"], again["w_in"])


# What may be asked of a router beside its name, to make its gates sum to one number, and the way
# its weights begin then; None = nothing does.
KEEPS = {
    "switch": ({}, "zeros"),
    "null": ({"k": 2}, "zeros"),
    "expert_choice": ({"factor": 4.0}, "draw"),
    "base": ({"gates": "sigmoid"}, "zeros"),
}
# Why a router does not: in words of the message.
REFUSE = {"relu": "its gates sum to", "soft": "mixtures"}


def model_with(name, given):
    block = {f"model.moe.routers.{name}.{key}": value for key, value in given.items()}
    changes = {"model.moe.router": name, "model.moe.num_experts": 4, "model.repeats": 1, **block}
    changes |= {"model.allow_leak": True, "data.seq_len": 16}
    if ROUTERS[name].num_slots(ROUTERS[name].options()):
        changes["model.moe.dispatcher"] = "slots"
    return tiny.build((1, 1, 1), changes).model


def drawn(weights):
    rng = np.random.default_rng(0)
    return {name: w.constant + w.std * rng.normal(size=w.shape) for name, w in weights.items()}


@pytest.mark.parametrize("name", [name for name in ROUTERS if not ROUTERS[name].replays])
def test_every_router_keeps_the_function_or_says_why(name):
    given, start = KEEPS.get(name, ({}, "draw"))
    model, router = model_with(name, given), ROUTERS[name]
    sizes = Sizes(model.d_model, 4, model.vocab_size)
    weights = drawn(router.params(sizes, model.moe.router_options))
    state = drawn(router.state(sizes, model.moe.router_options))
    if start == "zeros":
        weights = {key: np.zeros_like(x) for key, x in weights.items()}
    factor, reason = upcycling.weight_of_copies(model, weights, state, Shares(0, 1, 16))
    if name in REFUSE:
        assert REFUSE[name] in reason
    else:
        assert not reason and factor > 0


def made_of(dense, words, *, router="draw", change=STILL, restart=False, every=1):
    old = snapshot.read(open_run(dense))
    asked = Asked(words, every, router, change, 1.0, restart)
    return old, upcycled(old, asked)


def gap(old, made):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        before = snapshot.weights(old, old.arrays)
        return gaps(before, [snapshot.weights(made.snapshot, made.exact)])


GRANULAR = ("num_experts=6", "expert_hidden=8", "shared_experts=1", "shared_hidden=8")
GRANULAR += ("shared_gate=True", "routers.top_k.k=4")
CASES = {
    "granular, shared": (GRANULAR, "draw"),
    "capacity": (
        ("num_experts=4", "dispatcher=capacity", "dispatchers.capacity.factor=4.0"),
        "draw",
    ),
}


def words(keys):
    return [f"--config.model.moe.{key}" for key in keys]


@pytest.mark.parametrize("case", CASES)
def test_a_model_keeps_its_function(dense, case):
    keys, start = CASES[case]
    old, made = made_of(dense, words(keys), router=start)
    (far,), dropped = gap(old, made)
    assert not made.reasons and dropped == 0 and far <= PROMISED


@pytest.mark.full
@pytest.mark.parametrize("dispatcher", ["dropless", "capacity"])
@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in (*REFUSE, "recorded")])
def test_every_router_in_a_model(dense, name, dispatcher):
    given, start = KEEPS.get(name, ({}, "draw"))
    keys = ["num_experts=4", f"router={name}", f"dispatcher={dispatcher}"]
    keys += [f"routers.{name}.{key}={value}" for key, value in given.items()]
    if dispatcher == "capacity":
        if ROUTERS[name].own_capacity:
            return
        # All tokens may want one expert, where the router begins with zeros.
        keys.append("dispatchers.capacity.factor=8.0")
    asked = [*words(keys), "--config.model.allow_leak=True"]
    old, made = made_of(dense, asked, router=start)
    (far,), dropped = gap(old, made)
    assert not made.reasons and dropped == 0 and far <= PROMISED


def test_what_moves_says_so(dense):
    old, made = made_of(dense, words(["num_experts=4"]), change=Change(0.1, 0.5, 0), every=2)
    assert made.blocks == [1] and made.snapshot.config.model.blocks == ("dense", "moe")
    assert [reason.partition(" ")[0] for reason in made.reasons] == ["--noise", "--drop"]
    name = f"opt_state/direction/mu/{_block(made)}moe/experts/w_out"
    was = old.arrays["opt_state/direction/mu/repeats/1/blocks/0/dense/weights/w_out"]
    for copy in made.snapshot.arrays[name]:
        np.testing.assert_array_equal(copy, was)


def _block(made):
    name = next(n for n in made.snapshot.arrays if n.startswith("params/") and "/moe/" in n)
    return name.removeprefix("params/").partition("moe/")[0]


def test_the_command_makes_a_run_that_trains_on(dense, tmp_path, capsys):
    out = tmp_path / "out"
    keys = words(["num_experts=4", "router=sigmoid"])
    assert entry(["convert", "upcycle", "--workdir", str(dense), "--out", str(out), *keys]) == 0
    told = capsys.readouterr().out
    assert "24 to each of 4 experts" in told
    assert "the new model computes what the old one does" in told
    assert fsck.main([str(out)]) == 0
    made = open_run(out)
    assert made.step == surgery_cases.STEP and made.config.model.blocks == ("moe", "moe")
    moved = surgery_cases.goes_on(out)
    experts = moved["params/repeats/0/blocks/0/moe/experts/w_out"]
    # Copies become different as soon as they see different tokens.
    assert moved["step"] == 4 and np.abs(experts[0] - experts[1]).max() > 0


def test_mistakes_are_one_line(dense, tmp_path, capsys):
    flags = ["convert", "upcycle", "--workdir", str(dense), "--out", str(tmp_path / "new")]
    for more, message in (
        (["--config.model.moe.expert_hidden=10"], "makes no 8 experts of"),
        (["--config.model.d_model=32"], "is of the model that is there"),
        (["--config.data.seq_len=8"], "cannot change in a run that goes on"),
        (["--every", "3"], "chooses none of them"),
        (["--router", "normal:x"], 'write "draw", "zeros" or "normal:0.02"'),
        (["--optimizer", "half"], 'write "copy", "zero" or "scale:0.1"'),
        (["--drop", "2"], "must lie between 0 and 1"),
    ):
        assert entry([*flags, *more]) == 64
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
