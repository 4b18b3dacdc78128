"""The command `verify`: shrinking, meshes that are refused, the table, the verdict, the
certificate, two processes, bad arguments.
"""

import json
import re

import numpy as np
import pytest
import tiny
from block_options import OPTIONS

from moe_jax.commands import verify as command
from moe_jax.errors import UserError
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.parallel.mesh import Lengths
from moe_jax.tasks.lm import task as lm
from moe_jax.verify import alone, batches, certificate, run, shrink, states
from moe_jax.verify.alone import Check
from moe_jax.verify.compare import (
    Deviation,
    Rounded,
    deviations,
    largest,
    relative_gradients,
    rounded,
)
from moe_jax.verify.program import Probe, Program
from moe_jax.verify.run import ALL, Result, Row, Wanted, against, empty, reference, verify

LARGE = {
    "model.vocab_size": 50_000,
    "model.d_model": 1024,
    "model.num_heads": 16,
    "model.num_kv_heads": 4,
    "model.prefix": ("dense",),
    "model.repeats": 12,
    "model.scan": True,
    "model.remat": "dispatch",
    "model.param_dtype": "float32",
    "model.dtype": "bfloat16",
    "model.moe.num_experts": 64,
    "model.moe.routers.top_k.k": 6,
    "model.moe.group_rows": 2,
    "train.batch_size": 512,
    "train.micro_batch_size": 64,
    "data.seq_len": 2048,
}


def test_shrinking_keeps_what_decides_the_parallelism():
    yours = tiny.raw(LARGE)
    small, rules = shrink.shrink(yours)
    kept = (
        "model.prefix",
        "model.period",
        "model.scan",
        "model.remat",
        "model.moe.routers",
        "model.moe.group_rows",
    )
    assert all(shrink.get(small, key) == shrink.get(yours, key) for key in kept)
    # 16 is the first multiple of 8 from 2 k = 12 on; 4 micro-batches of 8 devices x 2 rows
    assert small["model"]["moe"]["num_experts"] == 16
    assert (small["train"]["batch_size"], small["train"]["micro_batch_size"]) == (64, 16)
    assert (
        small["model"]["num_heads"] == 2 * small["model"]["num_kv_heads"]
        and small["model"]["repeats"] == 2
    )
    found = {rule.key: (rule.yours, rule.shrunk) for rule in rules}
    assert found["model.moe.num_experts"] == (64, 16) and found["model.d_model"] == (1024, 16)
    for rule in rules:
        assert (
            shrink.get(yours, rule.key) == rule.yours
            and shrink.get(small, rule.key) == rule.shrunk
            and rule.why
        )
    assert not any(shrink.refusal(small, lengths) for lengths in ALL)


def test_experts_that_the_axis_does_not_divide_stay():
    small, _ = shrink.shrink(tiny.raw(LARGE | {"model.moe.num_experts": 60}))
    assert small["model"]["moe"]["num_experts"] == 60
    why = shrink.refusal(small, Lengths(expert=8))
    assert why == "model.moe.num_experts (60) must be divisible by mesh.expert (8)"
    assert not shrink.refusal(small, Lengths(data=2, expert=4))


def test_layouts():
    """The reference is plain; the layout has everything on.

    A loss that is defined per micro-batch keeps its micro-batches in both.
    """
    small, _ = shrink.shrink(tiny.raw(LARGE))
    plain, (layout, names) = shrink.plain(small), shrink.layout(shrink.plain(small))
    assert (
        plain["model"]["scan"],
        plain["model"]["remat"],
        plain["train"]["micro_batch_size"],
    ) == (False, "none", 0)
    assert (
        layout["model"]["scan"],
        layout["model"]["remat"],
        layout["train"]["micro_batch_size"],
    ) == (
        True,
        "full",
        16,
    )
    assert names == ["accumulate", "scan", "remat"]


def test_changes_leave_the_places_that_they_must_not_touch():
    cfg = tiny.build(changes={"data.seq_len": 16})
    inputs = lm.random(cfg, 3)
    for name, change in (batches.changes(inputs, inputs.segment_BS, 2) | batches.causal(2)).items():
        other, same_BS = change.apply(inputs, np.random.default_rng(0)), change.same(inputs)
        differs_BS = (other.tokens_BS != inputs.tokens_BS) | (other.targets_BS != inputs.targets_BS)
        assert differs_BS.any() and same_BS.any(), name
        if name != "document":
            assert not (differs_BS & same_BS).any(), name
    assert (inputs.segment_BS == 0).any() and (inputs.segment_BS == 2).any(1).all()


# A router with a state, and what drops by gate (the ordering) and by place (the dispatcher): the
# test below, of all, has each alone.
SMALL = {
    "model.repeats": 1,
    "model.dropout": 0.1,
    "model.allow_leak": True,
    "model.moe.router": "sigmoid",
    "model.moe.ordering": "rounding",
    "model.moe.dispatcher": "capacity",
}


def test_two_meshes_two_processes_and_a_certificate(float64, tmp_path, monkeypatch):
    """Proves a small config, with a mesh that is refused, in this process and two others."""
    raw, ones = tiny.raw(SMALL), []
    monkeypatch.setattr(run, "reference", lambda *args: ones.append(reference(*args)) or ones[-1])
    said: list[str] = []
    wanted = Wanted([Lengths(expert=2, model=2), Lengths(data=3)], 2, 2, False)
    found = verify(raw, wanted, tmp_path, said.append)
    assert found.proven, command.verdict(found)
    layout, mesh, refused, both = found.rows
    assert layout.name == "1x1x1 accumulate+scan+remat" and both.name == "1x2x2, 2 processes"
    assert mesh.reader == "1x1x1" and mesh.unequal == [] and mesh.rounded.steps == 20
    assert "must be divisible by mesh.data" in refused.refused and not refused.deviations
    assert {d.check for d in both.deviations.values()} == set(mesh.deviations) and both.deviations[
        "forward"
    ].value > 0
    assert (both.reader, both.unequal) == ("1x1x1", [])
    assert command.verdict(found).startswith(
        "PROVEN: 3 layouts equal one device over 2 steps; 1 refused"
    )
    assert [check.claim.split()[0] for check in found.alone][:4] == [
        "1x2x2",
        "1x2x2",
        "the",
        "padding",
    ]
    assert ("model.moe.orderings.rounding.tile", 16, 4) in [rule[:3] for rule in found.rules]
    served = found.alone[-1]
    dropped, assigned = map(int, re.match(r"(\d+) of (\d+) assignments", served.note).groups())
    assert served.sound and 0 < dropped < assigned / 2
    assert (
        moved(ones[0])
        and ones[0].probes[0].routing["dropped"].sum() == ones[0].probes[0].sums["dropped"].sum()
    )
    content = certificate.content(raw, "configs/x.py", ["model.x=1"], found, command.verdict(found))
    certificate.write(tmp_path / "c.json", content)
    back = json.loads((tmp_path / "c.json").read_text())
    assert (
        back["proven"]
        and re.fullmatch("[0-9a-f]{64}", back["config_sha256"])
        and back["versions"]["jax"]
    )
    assert back["moe"]["router"].keys() == {"sigmoid"} and back["set"] == ["model.x=1"]
    assert back["meshes"][1]["checkpoint"] == {"read_on": "1x1x1", "unequal_arrays": []}
    certificate.write(tmp_path / "c.md", content)
    text = (tmp_path / "c.md").read_text()
    assert (
        "| 1x2x2 |" in text
        and "PROVEN" in text
        and "- set: `model.x=1`" in text
        and '- router: `{"sigmoid"' in text
        and "model.d_model" not in text.splitlines()[0]
    )


def moved(one):
    """What of the routers' state the steps changed: it is compared, so a mesh that moves it
    otherwise is found.
    """
    begin = states.named(one.program, one.begin)
    return {
        name
        for name in begin
        if name.startswith("router_state/") and (begin[name] != one.end[name]).any()
    }


BALANCED = {"model.moe.losses.balance": 0.0}
NEEDS = {
    "base": {"model.allow_leak": True},
    "relu": BALANCED,
    "expert_choice": BALANCED | {"model.allow_leak": True},
    "soft": BALANCED | {"model.allow_leak": True, "model.moe.dispatcher": "slots"},
}
# Of a recording there is none in a random batch; tests/instruments/test_instruments.py replays on
# meshes.
CASES = {
    name: {"model.moe.router": name, **NEEDS.get(name, {})}
    for name in ROUTERS
    if name != "recorded"
}
CASES |= {"null that copies": CASES["null"] | {"model.moe.routers.null.kind": "copy"}}
CASES |= {"sliding window": {"model.attention": "sliding_window"}}
NAMED = ("gpt-oss", "Gemma 2 and 3", "DeepSeek-V3", "T5, Switch")
CASES |= {name: OPTIONS[name] for name in NAMED}
CASES |= {"sparse experts": {"model.moe.sparse.rule": "rigl"}}
CASES |= {"latent experts": {"model.moe.latent_dim": 8, "model.moe.shared_experts": 1}}
CASES |= {"further tokens": {"model.kinds.decoder.mtp_depths": 2}}
CASES |= {"base of the batch": CASES["base"] | {"model.moe.routers.base.scope": "batch"}}
CASES |= {
    name: {
        "model.moe.ordering": name,
        "model.moe.dispatcher": "dropless" if ordering.always else "capacity",
        "model.allow_leak": ordering.sees_future,
    }
    for name, ordering in ORDERINGS.items()
}


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_every_router_and_ordering(float64, tmp_path, name):
    small, _ = shrink.shrink(tiny.raw({"model.repeats": 1, **CASES[name]}))
    one = reference(small, 2)
    states.write(one.program, one.begin, tmp_path / "begin")
    program = Program(small, Lengths(expert=2, model=2)).compile()
    _, worst, first = against(one, program, states.read(program, tmp_path / "begin"))
    assert first is None and set(worst) == {*run.compare.LIMITS}
    checks = [
        *alone.checks(one.program, one.begin),
        alone.served(one.probes, program.cfg.model.moe.num_experts),
    ]
    assert not [check for check in checks if not check.sound]
    drops, capacity = (
        one.probes[0].sums["dropped"].sum() > 0,
        program.cfg.model.moe.dispatcher == "capacity",
    )
    assert drops or not (name == "rounding" or capacity)
    asked_again = [
        check.claim for check in checks if check.claim.endswith("with top-k and dropless")
    ]
    assert all(check.judged or program.cfg.model.allow_leak or capacity for check in checks)
    assert len(asked_again) == (0 if all(check.judged for check in checks) else 2)
    assert bool(one.probes[0].routing) == (name not in ("soft", "null that copies"))
    assert bool(moved(one)) == (name in ("sigmoid", "quantile", "relu", "DeepSeek-V3"))


def test_single_choices_are_compared():
    """The same number of a row dropped, and of each expert counted: two tokens have exchanged their
    experts, or which is dropped.
    """

    def probe(expert, dropped):
        sums = {"counts": np.array([[[1.0, 1.0]]]), "dropped": np.array([[1.0]])}
        choices = {"expert": np.array(expert), "dropped": np.array(dropped), "gate": np.ones(2)}
        return Probe(1.0, {}, np.zeros(2), sums, choices, {"w": np.zeros(2)})

    want = [probe([0, 1], [True, False])]

    def compared(have):
        return deviations(want, [have], {}, {})

    assert compared(want[0])[1] is None
    worst, first = compared(probe([1, 0], [True, False]))
    assert first == Deviation("counts", 2.0, "single choices", 0) and worst["drops"].sound
    assert compared(probe([0, 1], [False, True]))[1] == Deviation("drops", 2.0, "single choices", 0)
    assert relative_gradients({"w": np.zeros(2)}, {"w": np.ones(2)})["w"] > 1  # what is 0 must be 0


def test_nothing_is_proven_of_a_layer_that_serves_nobody():
    sums = {
        "counts": np.array([[[3.0, 1.0, 5.0]], [[2.0, 2.0, 5.0]]]),
        "dropped": np.array([[1.0], [4.0]]),
    }
    probe = Probe(1.0, {}, np.zeros(1), sums, {}, {})
    assert alone.served([probe], 2) == Check(
        "every MoE layer serves somebody", 1.0, 0.0, "5 of 8 assignments dropped", True
    )
    assert alone.served([probe._replace(sums={**sums, "dropped": np.ones((2, 1))})], 2).sound


def result(row, checks=()):
    return Result([], list(checks), [row], 5, [])


def test_verdicts():
    bad = Deviation("gradients", 1.0, "repeats/0/q", 2)
    row = Row("2x2x2", "", "", {"gradients": bad}, bad, "1x1x1", [], None)
    assert (
        command.verdict(result(row))
        == "DEVIATES: 2x2x2, step 2: gradients of repeats/0/q by 1.0e+00 (limit 1e-09)"
    )
    assert command.verdict(result(row._replace(first=None, unequal=["params/x"]))).endswith(
        "its checkpoint read on 1x1x1 differs in params/x"
    )
    assert command.verdict(result(empty("2x2x2", failure="fails: E"))) == "DEVIATES: 2x2x2 fails: E"
    check = Check("later tokens change no earlier loss", 0.5, 1e-10, "", True)
    found = result(row._replace(first=None), [check])
    assert not found.proven and "one device: not so: later tokens" in command.verdict(found)
    assert result(row._replace(first=None), [check._replace(judged=False)]).proven
    assert not check._replace(value=float("nan")).sound
    tied = bad._replace(step=5)  # the step after the five that are compared
    assert command.verdict(result(row._replace(first=tied))).startswith(
        "DEVIATES: 2x2x2, with all router scores equal: grad"
    )


def test_nan_is_the_largest():
    """For `max` it is not: max(0.0, nan) is 0.0."""
    nan = float("nan")
    assert largest({"a": 1.0, "b": nan, "c": 2.0})[0] == "b" and largest({}) == ("", 0.0)

    def probe(loss):
        return Probe(loss, {}, np.zeros(2), {}, {}, {"w": np.zeros(2)})

    worst, first = deviations([probe(1.0)] * 3, [probe(1.0), probe(nan), probe(2.0)], {}, {})
    assert np.isnan(worst["forward"].value) and first.step == 1
    assert np.isnan(alone._everything(probe(1.0), probe(nan))["loss"])


def test_a_mesh_that_only_the_config_as_it_is_refuses_is_told():
    raw = tiny.raw({"model.num_heads": 4, "model.num_kv_heads": 4})
    small, _ = shrink.shrink(raw)
    (line,) = run.unlike(
        raw, small, [Lengths(model=8), Lengths(data=2, expert=2, model=2), Lengths(data=3)]
    )
    assert line.startswith(
        "1x1x8: the config as it is refuses this mesh (model.num_heads (4) must be divisible by "
        "mesh.model (8))"
    )


def test_rounding_is_reported_with_the_first_flip():
    def probe(loss, first):
        return Probe(loss, {}, np.zeros(1), {"counts": np.array([[first, 2.0]])}, {}, {})

    want, have = [probe(2.0, 1.0)] * 3, [probe(2.0, 1.0), probe(2.1, 3.0), probe(2.0, 1.0)]
    assert rounded(want, have) == Rounded(pytest.approx(0.05), 1, 3)
    assert rounded(want, want).flip is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--meshes", "2x2"], "--meshes 2x2: write DATAxEXPERTxMODEL, as in 2x2x2"),
        (["--meshes", "8x8x1"], "the mesh 8x8x1 has more than 32 devices"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--processes", "3"], "--processes 3 must be one of 1, 2, 4, 8"),
        (
            ["--processes", "8", "--meshes", "1x2x2"],
            "--processes 8 cannot share the 4 devices of the mesh 1x2x2 evenly",
        ),
        (
            ["--config.model.d_modle=3"],
            'no key is called --config.model.d_modle: did you mean "d_model"?',
        ),
        (["--set", "model.d_model=3"], "--set model.d_model=3: write --config.model.d_model=3"),
        (["--meshes", ""], "write DATAxEXPERTxMODEL"),
        (
            ["--certificate", "not/there.json"],
            "--certificate not/there.json cannot be written: No such file",
        ),
        (["--config.model.d_model"], "Missing value for flag --config.model.d_model"),
        (["--config.model.moe.dispatchers.capacity.factor=2.0"], "does nothing"),
        (
            ["--config.model.moe.num_experts=9", "--config.model.moe.routers.top_k.k=10"],
            "must lie between 1 and",
        ),
        (
            ["--config.model.moe.num_experts=9", "--meshes", "1x2x1"],
            "every mesh is refused for the config as it was shrunk (docs/verify.md): "
            "model.moe.num_experts (9)",
        ),
    ],
)
def test_mistakes(float64, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(["--config", "configs/debug.py", *arguments])
