"""`moe_jax.verify.foreign`: its arithmetic against the oracle of the tests, layers that are right
and layers that are wrong, what it prints, the example of docs/verify.md.
"""

import functools
import io
import json
import re
from pathlib import Path

import foreign_layers as layers
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from moe_jax.errors import UserError
from moe_jax.verify import foreign
from moe_jax.verify.foreign import Layer, Sizes, arithmetic
from moe_jax.verify.foreign.cases import cases

ROOT = Path(__file__).parents[2]
MESHES = [{"expert": 8}, {"data": 2, "expert": 4}, {"data": 4, "expert": 2}]
SMALL = Sizes(tokens=16, d_model=4, experts=4, hidden=4)


@pytest.mark.parametrize(("capacity", "group"), [(None, 16), (5, 16), (2, 8)])
@pytest.mark.parametrize("given", ["router", "choices"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_arithmetic_is_the_oracle_of_the_tests(given, activation, capacity, group):
    """Two pieces of NumPy that share no line: all tokens at once, and one assignment at a time."""
    more = {"capacity": capacity, "group_tokens": group}
    layer = Layer(lambda *_: None, given=given, activation=activation, **more)
    for case in cases(layer, SMALL, seed=1):
        inputs, dy_TD = case.inputs, case.dy_TD
        want = arithmetic.expected(inputs, layer, dy_TD)
        expert_TK, gate_TK = inputs.expert_TK, inputs.gate_TK
        if given == "router":
            expert_TK, gate_TK, _ = oracle.top_k(inputs.x_TD, inputs.router_DE, 2)
        # A factor that gives as many places: capacity = factor * K * tokens of a group / E.
        factor = capacity * SMALL.experts / (2 * group) if capacity else None
        served = oracle.served(expert_TK, inputs.valid_T, SMALL.experts, group, factor)
        parts = [inputs.w_up_EDF]
        if activation == "swiglu":
            parts = [inputs.w_gate_EDF, inputs.w_up_EDF]
        w_in_EDPF = np.stack(parts, 2)
        assignments = [(t, expert_TK[t, j], gate_TK[t, j]) for t, j in served]
        y, dx, dgates, dw_in, dw_out = oracle.experts(
            inputs.x_TD, assignments, w_in_EDPF, inputs.w_down_EFD, dy_TD
        )
        dgate_TK = np.zeros_like(gate_TK)
        for (t, j), value in zip(served, dgates, strict=True):
            dgate_TK[t, j] = value
        gradients = {"x_TD": dx, "gate_TK": dgate_TK, "w_down_EFD": dw_out}
        gradients["w_up_EDF"] = dw_in[:, :, -1]
        gradients["w_gate_EDF"] = dw_in[:, :, 0]
        if given == "router":
            more_dx, gradients["router_DE"] = oracle.top_k_backward(
                inputs.x_TD, inputs.router_DE, 2, dgate_TK
            )
            gradients["x_TD"] = dx + more_dx
        np.testing.assert_allclose(want.y_TD, y, atol=1e-12)
        for name, gradient in want.gradients.items():
            np.testing.assert_allclose(gradient, gradients[name], atol=1e-11, err_msg=name)
        kept = {(int(t), int(j)) for t, j in np.argwhere(~want.dropped_TK)}
        assert {(t, j) for t, j in kept if inputs.valid_T[t]} == set(served)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_gradient_of_gates_is_that_of_finite_differences(score, renormalize):
    layer = Layer(lambda *_: None, score=score, renormalize=renormalize, scale=1.5)
    rng = np.random.default_rng(0)
    logits_TE, weight_TK = rng.normal(size=(3, 5)), rng.normal(size=(3, 2))

    def value(logits_TE):
        return (arithmetic.choose(logits_TE, layer)[1] * weight_TK).sum()

    expert_TK, _ = arithmetic.choose(logits_TE, layer)
    have = arithmetic.choose_backward(logits_TE, expert_TK, weight_TK, layer)
    for place in np.ndindex(logits_TE.shape):
        step = np.zeros_like(logits_TE)
        step[place] = 1e-5
        slope = (value(logits_TE + step) - value(logits_TE - step)) / 2e-5
        assert have[place] == pytest.approx(slope, abs=1e-8)


def test_layers_that_are_right_are_proven():
    """Dense dispatch in plain jax, left to XLA's partitioner, and expert parallelism by hand."""
    dense = Layer(layers.capped(), capacity=layers.CAPACITY, specs=layers.SPECS)
    report = foreign.check(dense, MESHES[:2])
    assert report.proven, report.verdict()
    assert report.verdict() == (
        "PROVEN: equals plain arithmetic (output, drops, gradient) in 6 cases on 3 meshes"
    )
    assert report.meshes == ["one device", "expert 8", "data 2 x expert 4"]
    # The cases have something to drop, or nothing is shown of capacity.
    dropped = [
        arithmetic.expected(case.inputs, dense, case.dy_TD).dropped_TK.sum()
        for case in cases(dense, Sizes(), 0)
    ]
    assert min(dropped) > 0 and report.dropped == (sum(dropped), 5 * 64 + 2 * 21)
    console = Console(width=120, record=True, file=io.StringIO())
    report.show(console)
    assert f"; {sum(dropped)} of 362 choices have no place" in console.export_text()
    report = foreign.check(layers.parallel(), MESHES)
    assert report.proven, report.verdict()
    # Without a mask there is no padding, and nothing is told of what is dropped.
    assert "(output, gradient) in 5 cases on 4 meshes" in report.verdict()


def test_other_equations_are_proven():
    """Choices that are given, sigmoid scores as they are, GELU."""
    gates = {"score": "sigmoid", "renormalize": False, "scale": 2.5}
    for more in ({"given": "choices"}, gates):
        report = foreign.check(Layer(layers.all_experts, activation="gelu", **more))
        assert report.proven, report.verdict()
    wrong = foreign.check(Layer(layers.all_experts, activation="gelu", score="sigmoid"))
    assert not wrong.worst("output").sound


def test_a_gate_that_is_not_renormalised_is_found():
    report = foreign.check(Layer(layers.capped(renormalize=False), capacity=layers.CAPACITY))
    assert report.verdict().startswith("DEVIATES: one device, random tokens: output by ")
    # It is right for whoever says so.
    said = Layer(layers.capped(renormalize=False), capacity=layers.CAPACITY, renormalize=False)
    assert foreign.check(said).proven


def test_another_order_than_that_of_tokens_is_found():
    """By expert (the first ones fill all places), and by choice (first ones before second ones)."""
    by_expert = functools.partial(layers.dense_dispatch, queue=layers.in_expert_order)
    by_choice = layers.capped(queue=layers.in_choice_order)
    for wrong in (by_expert, by_choice):
        report = foreign.check(Layer(wrong, capacity=layers.CAPACITY))
        assert report.worst("drops").value > 0 and not report.worst("output").sound
    # Where nothing is dropped, no order can be wrong.
    dropless = functools.partial(layers.dense_dispatch, queue=layers.in_choice_order)
    assert foreign.check(Layer(dropless)).proven


def test_expert_gradients_times_the_axis_are_found_on_meshes_alone():
    report = foreign.check(layers.parallel(times_axis=True), [{"expert": 4, "data": 2}])
    assert re.fullmatch(
        r"DEVIATES: expert 4 x data 2, random tokens: gradient of w_\w+_E\w\w by 3.0e\+00 "
        r"\(limit 1e-09\)",
        report.verdict(),
    )
    for mesh, sound in (("one device", True), ("expert 4 x data 2", False)):
        assert report.worst("output", mesh=mesh).sound
        assert report.worst("gradient", mesh=mesh).sound is sound


def test_mixtral_differs_by_the_rounding_of_its_router():
    """transformers rounds the logits of the router to float32; without that it is plain arithmetic
    to the last digits.
    """
    report = foreign.check(layers.Mixtral().layer())
    told = report.worst("output").value, report.worst("gradient").value
    assert not report.proven and all(1e-9 < value < 1e-5 for value in told), told
    wide = foreign.check(layers.Mixtral(wide_router=True).layer())
    assert wide.proven, wide.verdict()
    assert wide.worst("gradient").value < 1e-12


def test_gradients_that_a_jax_layer_gives_itself_are_compared():
    def none(inputs, dy_TD, mesh):
        moving = ("x_TD", "logits_TE", "w_gate_EDF", "w_up_EDF", "w_down_EFD")
        return {name: 0 * getattr(inputs, name) for name in moving}

    report = foreign.check(Layer(layers.dense_dispatch, backward=none))
    assert report.worst("output").sound and report.worst("gradient").value == 1.0


def test_float32_has_limits_of_its_own():
    layer = Layer(layers.capped(), capacity=layers.CAPACITY, dtype="float32")
    report = foreign.check(layer)
    assert report.proven and report.worst("output").value > 1e-9


def test_what_a_layer_raises_is_a_result():
    def fails(inputs, mesh):
        if mesh.shape["expert"] > 1:
            raise RuntimeError("no\nroom")
        return layers.dense_dispatch(inputs, mesh)

    report = foreign.check(Layer(fails), [{"expert": 2}])
    assert report.verdict() == "DEVIATES: expert 2 fails: RuntimeError: no room"
    short = foreign.check(Layer(lambda inputs, mesh: inputs.x_TD[:1], numpy=True))
    assert "the output has the shape (1, 8), and should have (32, 8)" in short.verdict()
    nan = foreign.check(Layer(lambda inputs, mesh: np.nan * inputs.x_TD, numpy=True))
    assert "random tokens: output by nan" in nan.verdict()
    poor = Layer(lambda inputs, mesh: inputs.x_TD, numpy=True, backward=lambda *_: {})
    assert "Layer.backward returned no gradient of " in foreign.check(poor).verdict()


def test_the_tables_and_the_certificate(tmp_path):
    report = foreign.check(layers.parallel(times_axis=True), [{"expert": 2}])
    console = Console(width=120, record=True, file=io.StringIO())
    report.show(console)
    text = console.export_text()
    for part in (
        "one device",
        "expert 2",
        "every other expert serves nobody",
        "worst gradient: w_",
    ):
        assert part in text
    report.write(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    assert not content["proven"] and len(content["findings"]) == 2 * 5 * 2
    assert content["said"]["given"] == "router" and content["specs"]["x_TD"]
    report.write(tmp_path / "c.md")
    assert (
        "| expert 2 | random tokens | gradient | 1.0e+00 | 1e-09 | w_"
        in (tmp_path / "c.md").read_text()
    )
    with pytest.raises(UserError, match="cannot be written"):
        report.write(tmp_path / "no" / "c.md")


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match='given = "weights" is not known: choose one of router'):
        Layer(layers.dense_dispatch, given="weights")
    with pytest.raises(UserError, match='specs has "w_in", which is no array of a layer'):
        Layer(layers.dense_dispatch, specs={"w_in": P()})
    with pytest.raises(UserError, match=r"sizes.experts \(2\) must be more than Layer.k \(2\)"):
        foreign.check(Layer(layers.dense_dispatch), sizes=Sizes(experts=2))
    with pytest.raises(UserError, match="the mesh expert 16 needs 16 devices, and jax has 8"):
        foreign.check(Layer(layers.dense_dispatch), [{"expert": 16}])


def test_the_example_of_the_docs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/verify.md").read_text()
    (example,) = re.findall(r"```python\n(.*?foreign.*?)```", page, re.DOTALL)
    assert len(example.splitlines()) <= 25
    exec(compile(example, "docs/verify.md", "exec"), {})
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert printed.startswith("PROVEN: equals plain arithmetic") and f"    {printed}\n" in page
    assert printed in (tmp_path / "certificate.md").read_text()
