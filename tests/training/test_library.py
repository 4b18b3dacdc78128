"""The public face: `import moe_jax` is cheap, and the layer works in anybody's model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from flax import nnx

import moe_jax
from moe_jax.errors import UserError
from moe_jax.moe.routing import ROUTERS

ROOT = Path(__file__).parents[2]
X = jax.random.normal(jax.random.key(1), (4, 8, 16))


def test_the_package_is_imported_without_jax():
    program = (
        "import sys, moe_jax; print(dir(moe_jax)); assert 'jax' not in sys.modules; "
        "from moe_jax import MoELayer, ROUTERS, load_run, train, verify; "
        "print(len(ROUTERS), train.from_config, verify.from_config)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'load_run'" in done.stdout
    assert sorted(moe_jax.__all__, key=str.lower) == [
        "load_run",
        "MoELayer",
        "ROUTERS",
        "train",
        "verify",
    ]
    assert moe_jax.ROUTERS is ROUTERS
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = moe_jax.Trainer


def test_the_script_of_the_readme(capsys):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line for line in script.splitlines() if line]
    assert len(lines) <= 15
    names = {}
    exec(script, names)
    figures, value = names["figures"], names["value"]
    assert figures["counts"].sum() == 4 * 16 * 2 and figures["drop_fraction"] == 0
    assert np.isfinite(value) and str(value) in capsys.readouterr().out
    moved = jax.tree.leaves(jax.tree.map(lambda z: float(abs(z).max()), names["grads"]))
    assert len(moved) == 3 and min(moved) > 0  # the gate and both matrices of the experts


@pytest.mark.full
def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)
    book = json.loads((ROOT / "docs/notebooks/first_run.ipynb").read_text())
    names = {}
    for cell in book["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    assert "30 steps, " in said and "step 30: 8 experts, router top_k" in said
    np.testing.assert_allclose(names["share"].sum(-1), 1)
    assert names["result"].evaluation["bits_per_byte"] < 8


@pytest.mark.full
def test_a_config_is_verified_in_a_program(float64):
    found = moe_jax.verify.from_config("debug", "--config.seed=1", meshes=("1x2x2",), steps=1)
    assert found.proven and "1x2x2" in [row.name.split()[0] for row in found.rows]


class Net(nnx.Module):
    def __init__(self, **options):
        self.moe = moe_jax.MoELayer(16, 4, 8, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, **told):
        y, routing = self.moe(x, **told)
        return x + y, routing


def loss(net, x):
    y, routing = net(x)
    return jnp.square(y - 1).mean() + 0.01 * routing.balance() + 0.001 * routing.z(), routing


def test_it_is_the_same_in_and_out_of_jit_and_on_a_mesh():
    net = Net()
    alone, _ = loss(net, X)
    in_jit, _ = nnx.jit(loss)(net, X)
    (with_grad, _), grads = nnx.value_and_grad(loss, has_aux=True)(net, X)
    (both, _), again = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(net, X)
    np.testing.assert_allclose([in_jit, with_grad, both], [alone] * 3, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, grads)
    with jax.set_mesh(meshes.make(2, 2, 2)):
        on_mesh, routing = nnx.jit(loss)(Net(), meshes.put(X, "batch"))
        np.testing.assert_allclose(on_mesh, alone, rtol=1e-5)
        assert routing.figures()["counts"].sum() == 4 * 8 * 2


def test_its_router_learns():
    net = Net(router="sigmoid", router_options={"k": 1, "bias_rate": 0.1})
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x):
        (value, routing), grads = nnx.value_and_grad(loss, has_aux=True)(net, x)
        optimizer.update(net, grads)
        net.moe.update(routing)
        return value

    values = [float(step(net, optimizer, X)) for _ in range(10)]
    assert values[-1] < 0.8 * values[0]
    assert np.abs(net.moe.layer.state["bias"]).max() > 0


def test_padding_goes_nowhere_and_capacity_drops():
    net = Net(dispatcher="capacity", dispatcher_options={"factor": 0.5})
    valid = jnp.arange(8)[None] < jnp.array([8, 4, 2, 1])[:, None]
    _, routing = net(X, valid_BS=valid)
    figures = routing.figures()
    assert figures["counts"].sum() == 15 * 2 and figures["drop_fraction"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "top"}, 'model.moe.router = "top" is not known: choose one of '),
        (
            {"router_options": {"kk": 2}},
            'MoELayer: no key is called "kk"; `python -m moe_jax config` prints',
        ),
        ({"router_options": {"k": 5}}, "model.moe.routers.top_k.k (5) must lie between 1 and"),
        ({"router": "soft"}, "slots"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError) as error:
        Net(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_mesh_is_refused():
    net = Net()
    other = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with jax.set_mesh(other), pytest.raises(UserError, match="the mesh that is set has the axes"):
        net(X)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "recorded"])
def test_every_router_works_in_it(router):
    extra = {"soft": {"dispatcher": "slots"}, "hash": {"vocab_size": 50}}.get(router, {})
    net = Net(router=router, **extra)
    ids = jnp.arange(32).reshape(4, 8)
    y, routing = net(X, id_BS=ids, rng=jax.random.key(2))
    assert np.isfinite(routing.auxiliary(balance=0.01, z=0.001))
    assert np.isfinite(y).all() and routing.figures()["drop_fraction"] >= 0
    net.moe.update(routing)
