"""What may not change a balance loss: mesh, accumulation, remat, scan; what statistics of one
device alone would get wrong; the adaptive weight; and MaxVio. The definitions of the losses are
in test_losses.py.

`pytest tests/moe/test_balance.py -k one_device_alone -s` prints the figures of docs/balance.md.
"""

import re
import zlib

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from moe_jax import checkpoint, layout, train_step
from moe_jax.checkpoint import flat
from moe_jax.errors import UserError
from moe_jax.evaluate import summary
from moe_jax.moe import load, losses
from moe_jax.moe.layer import Batch
from moe_jax.schema.config import AdaptiveConfig
from moe_jax.tasks.lm import task as lm

pytestmark = pytest.mark.usefixtures("standard_promotion")  # whole models are trained

# Every loss is on, `load` too: the router has noise, the same on every mesh. Capacity drops, and
# the drops drive the adaptive weight.
ALL = {
    "model.moe.router": "noisy_top_k",
    **{f"model.moe.losses.{name}": 0.1 for name in losses.LOSSES},
    "model.moe.dispatcher": "capacity",
    "model.moe.dispatchers.capacity.factor": 1.0,
    "model.moe.adaptive.rate": 0.5,
    "model.moe.adaptive.target_drop": 0.145,
    "data.seq_len": 32,
}
RNG = 7
REST = (
    "tokens",
    "dropped",
    "z",
    "entropy",
    "gate",
    "gate_max",
)  # sums of load.metrics beside counts


def one_batch(cfg, sort=False):
    """Packed documents, padded tails, and one row of nothing but padding.

    `sort`: rows of one device share 8 of the 64 tokens.
    """
    batch = tiny.batch(cfg)
    tokens = batch.tokens_BS
    if sort:
        tokens = tokens % 8 + 8 * (np.arange(len(tokens)) * 8 // len(tokens))[:, None].astype(
            np.int32
        )
    batch.segment_BS[3] = 0
    return batch._replace(tokens_BS=tokens)


def drawn(program):
    """(parameters, router state): the same numbers on every mesh and in every layout, without
    compiling `init`.
    """

    def draw(name, shape, place):
        names = layout.layer_names(name, shape, program.cfg.model.scan)

        def one(name, shape):
            return np.random.default_rng(zlib.crc32(name.encode())).normal(0.0, 0.25, shape)

        value = np.stack([one(n, shape[1:]) for n in names]) if names else one(name, shape)
        return jax.device_put(value + name.endswith("scale"), NamedSharding(program.mesh, place))

    first = jax.eval_shape(program.init, jax.random.key(0))
    named = {
        name: draw(name, x.shape, x.sharding.spec) for name, x in flat.flatten(first.params).items()
    }
    return flat.unflatten(named, first.params), jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype), first.router_state
    )


def pulled(program, figures):
    """batch -> ({name:

    (value, gradient of the routers' matrices)}, weights of the balance losses after the step [L]);
    compiled once.

    `figures(params, router state, batch)` -> (a dict of scalars, the MoE layers' totals).
    """
    scan = program.cfg.model.scan

    @jax.jit
    def run(gates, params, router_state, batch, weights):
        def of(gates):
            return figures(
                flat.unflatten(flat.flatten(params) | gates, params), router_state, batch
            )

        values, pull, totals = jax.vjp(of, gates, has_aux=True)
        after = train_step.update_routers(program.cfg, router_state, totals)
        return (
            values,
            pull(weights)[0],
            layout.by_moe_layer(after, program.cfg.model)["balance_weight"],
        )

    def all_of(batch):
        with jax.set_mesh(program.mesh):
            params, router_state = drawn(program)
            args = (params, router_state, tiny.put(program.cfg, batch))
            gates = {name: x for name, x in flat.flatten(params).items() if "/router/" in name}
            zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(figures, *args)[0])
            found = {
                name: run(gates, *args, zero | {name: jnp.ones_like(zero[name])}) for name in zero
            }
            by_name = {
                name: (float(values[name]), vector(slope, scan))
                for name, (values, slope, _) in found.items()
            }
            return by_name, np.asarray(found.popitem()[1][2])

    return all_of


def vector(gradient, scan):
    """The gradient of every layer as one vector, in the order of the layers."""
    named = flat.unstack(gradient, scan)
    return np.concatenate([np.asarray(named[name]).reshape(-1) for name in sorted(named)])


def of_step(program):
    """The losses as a training step has them."""
    loss = train_step.make_loss(program.cfg, program.model)

    def figures(params, router_state, batch):
        totals, parts = loss(params, router_state, batch, jax.random.key(RNG))[1]
        return {name: parts[f"{name}_loss"] for name in losses.LOSSES}, totals["moe"]

    return pulled(program, figures)


def averaged(parts):
    """Each loss as the mean over the parts of a batch, {name: scalar}; `parts`: sums per row [part,
    L, rows, ...].
    """
    each = jax.vmap(
        lambda sums: {n: loss.value(load.totals(sums)).mean() for n, loss in losses.LOSSES.items()}
    )(parts)
    return {name: value.mean() for name, value in each.items()}


def of_rows(program):
    """On one device, from the sums per row: the losses averaged over n micro-batches (strided
    rows), or n devices (runs of rows).
    """

    def split(sums, n, strided):
        def rows(z):
            return (
                z.reshape((z.shape[0], z.shape[1] // n, n) + z.shape[2:]).swapaxes(1, 2)
                if strided
                else z
            )

        return jax.tree.map(
            lambda z: rows(z).reshape((z.shape[0], n, -1) + z.shape[2:]).swapaxes(0, 1), sums
        )

    def figures(params, router_state, batch):
        seen = Batch(batch.tokens_BS, batch.position_BS, batch.segment_BS, batch.row_B)
        sums = program.model.bind(params, router_state)(seen, jax.random.key(RNG), True)[1]
        kinds = [("strided", 1), ("strided", 2), ("strided", 4), ("alone", 2), ("alone", 8)]
        found = {f"{kind}/{n}": averaged(split(sums, n, kind == "strided")) for kind, n in kinds}
        named = {
            f"{kind}/{name}": value
            for kind, values in found.items()
            for name, value in values.items()
        }
        return named, load.totals(sums)

    return pulled(program, figures)


@pytest.fixture(scope="module")
def by_rows():
    """Of one device, one batch and a loop over layers: from mixed rows and from sorted ones."""
    with jax.enable_x64(True):
        program = tiny.Program((1, 1, 1), ALL)
        compiled = of_rows(program)
        return {sort: compiled(one_batch(program.cfg, sort)) for sort in (False, True)}


@pytest.mark.parametrize(
    ("shape", "num", "changes"),
    [
        ((2, 2, 2), 4, {"model.scan": True, "model.remat": "full"}),
        pytest.param((2, 4, 1), 2, {"model.remat": "dispatch"}, marks=pytest.mark.full),
    ],
    ids=lambda z: meshes.name(z) if isinstance(z, tuple) else None,
)
def test_no_loss_changes_with_mesh_accumulation_remat_or_scan(
    float64, by_rows, shape, num, changes
):
    """Value and gradient of the router; `micro_batch_balance` is the mean of the products of the
    micro-batches, which are strided rows.
    """
    program = tiny.Program(shape, ALL | changes | {"train.micro_batch_size": 16 // num})
    reference, weight_L = by_rows[False]
    found, changed_L = of_step(program)(one_batch(program.cfg))
    np.testing.assert_array_equal(changed_L, weight_L)
    worst = {}
    for name, (value, gradient) in found.items():
        want, slope = reference[f"strided/{num if name == 'micro_batch_balance' else 1}/{name}"]
        worst[name] = abs(value - want), np.abs(gradient - slope).max() / np.abs(slope).max()
    print(
        f"\n{meshes.name(shape)}, {num} micro-batches: worst deviations "
        f"{np.max(list(worst.values()), 0)}"
    )
    assert all(np.max(deviation) < 1e-10 for deviation in worst.values()), worst


def test_micro_batch_balance_depends_on_their_number_alone(by_rows):
    reference, _ = by_rows[False]

    def value(n):
        return reference[f"strided/{n}/micro_batch_balance"][0]

    assert value(1) == pytest.approx(reference["strided/1/balance"][0], rel=1e-12)
    assert abs(value(2) - value(1)) > 1e-3 and abs(value(4) - value(2)) > 1e-3


def test_what_statistics_of_one_device_alone_get_wrong(by_rows):
    """Each device takes the loss of its own rows, and losses are averaged: the usual way.

    Relative to the loss of the whole batch.
    """
    print(
        "\n| loss | devices | rows | error of the loss | error of the router's gradient "
        "|\n|---|---|---|---|---|"
    )
    for name in losses.LOSSES:
        for n, sort in ((2, False), (8, False), (8, True)):
            (want, slope), (value, gradient) = (
                by_rows[sort][0][f"{how}/{name}"] for how in ("strided/1", f"alone/{n}")
            )
            of_loss = abs(value - want) / want
            of_slope = np.linalg.norm(gradient - slope) / np.linalg.norm(slope)
            rows = "sorted" if sort else "mixed"
            print(f"| `{name}` | {n} | {rows} | {100 * of_loss:.3g} % | {100 * of_slope:.3g} % |")
            assert (
                of_slope > 1e-3
            )  # padding alone makes it wrong: devices have different numbers of tokens


# The adaptive weight


def dropping(dropped):
    """Totals of one layer, 100 assignments."""
    return {"counts": jnp.full(4, 25.0), "dropped": jnp.asarray(dropped)}


def test_the_adaptive_weight_by_hand(float64):
    """Rate 1/2, target 1 %: x 3/2 while more than one of 100 is dropped, then / (3/2); never beyond
    2 or 1/2.
    """
    options = AdaptiveConfig(rate=0.5, target_drop=0.01, limit=2.0)
    weight, seen = jnp.float64(1.0), []
    for dropped in (2.0, 2.0, 1.0, 1.0, 0.0, 0.0, 30.0):
        weight = losses.adapt(weight, dropping(dropped), options)
        seen.append(float(weight))
    np.testing.assert_allclose(seen, [1.5, 2.0, 4 / 3, 8 / 9, 16 / 27, 0.5, 0.75])
    idle = {"counts": jnp.zeros(4), "dropped": jnp.float64(0.0)}  # a step without tokens
    np.testing.assert_allclose(losses.adapt(jnp.float64(1.0), idle, options), 2 / 3)


def test_drops_of_each_layer_drive_its_own_weight(by_rows):
    """One layer of ALL drops more than the target, the other less."""
    assert sorted(by_rows[False][1].tolist()) == [2 / 3, 1.5]


@pytest.mark.parametrize("router", ["noisy_top_k", "sigmoid", "quantile", "relu"])
def test_router_state_is_checkpointed(float64, tmp_path, router):
    """Written by a loop over layers on one device, read by a scan on eight; each layer keeps its
    own. Nothing is compiled.
    """
    changes = (
        ALL if router == "noisy_top_k" else {"model.moe.router": router}
    )  # ALL: the adaptive weight

    def first(shape, scan):
        program = tiny.Program(shape, changes | {"model.scan": scan})
        with jax.set_mesh(program.mesh):
            return program, jax.eval_shape(program.init, jax.random.key(0))

    def filled(x):
        return jnp.zeros(x.shape, x.dtype)  # all on one device

    loop, abstract = first((1, 1, 1), False)
    saves = checkpoint.Checkpoints(tmp_path, every=1, keep=1, keep_best=0)
    with jax.set_mesh(loop.mesh):
        before = jax.tree.map(filled, abstract)

        def count(z):
            return jnp.arange(1.0, z.size + 1).reshape(z.shape)

        wanted = {
            n: count(z) for n, z in layout.by_moe_layer(before.router_state, loop.cfg.model).items()
        }
        router_state = layout.into_moe_layers(wanted, before.router_state, loop.cfg.model)
        saves.save(
            1, before._replace(router_state=router_state), metadata={}, score=None, stacked=False
        )
    scan, abstract = first((2, 2, 2), True)
    with jax.set_mesh(scan.mesh):
        after = saves.restore(1, abstract, stacked=True)
        found = layout.by_moe_layer(after.router_state, scan.cfg.model)
    saves.close()
    assert list(found) == [{"noisy_top_k": "balance_weight", "relu": "l1"}.get(router, "bias")]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.moe.losses.load": 0.1},
            'model.moe.losses.load = 0.1 needs a sum that model.moe.router = "top_k" does not give',
        ),
        ({"model.moe.losses.gshard": -1.0}, "model.moe.losses.gshard = -1.0 must be at least 0"),
        (
            {"model.moe.adaptive.rate": 0.1},
            'model.moe.dispatcher = "dropless" has room for all',
        ),
        (
            {"model.moe.adaptive.rate": 0.1, "model.moe.losses.balance": 0.0},
            "model.moe.adaptive.rate = 0.1 drives the weight of the balance losses, but all their "
            "coefficients are 0",
        ),
        ({"model.moe.adaptive.limit": 0.5}, "model.moe.adaptive.limit = 0.5 must be at least 1"),
    ],
)
def test_coefficients_that_cannot_work_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny.build((1, 1, 1), changes)


# MaxVio


def test_max_vio_of_a_whole_evaluation_is_not_the_mean_of_its_batches():
    """Batches with counts (3, 1) and (1, 3) have MaxVio 1/2 each; together the load is (4, 4):

    0. The second layer keeps (6, 2): 1/2.
    """

    def of(counts):
        return {"counts": jnp.array(counts), **{name: jnp.array([4.0, 4.0]) for name in REST}}

    batches = [of([[3.0, 1.0], [3.0, 1.0]]), of([[1.0, 3.0], [3.0, 1.0]])]
    for batch in batches:
        np.testing.assert_allclose(load.metrics(batch)["max_vio"], [0.5, 0.5])
    both = jax.tree.map(lambda a, b: np.asarray(a + b), *batches)
    ones = {name: np.ones(1) for name in ("tokens", "nll", "correct", "bytes")}
    result = summary(
        lm.TASK,
        ones | {"moe": both, "depth": {}, "further": {}, "routing": np.zeros((2, 1, 2))},
        tiny.DATA,
    )
    np.testing.assert_allclose(result["moe"]["max_vio"], [0.0, 0.5])
    assert result["max_vio"] == 0.25  # a scalar, which publish.py writes as eval/max_vio
