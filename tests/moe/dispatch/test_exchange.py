"""How tokens travel between the devices of experts: ragged exchange, its twin and its check, and
exchange over two levels of network.

The dispatcher is held to the NumPy oracle in float64, forward and gradient, as in
test_dispatch.py.
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from dispatch_cases import FACTOR, B, D, K, S, check, forward

from moe_jax.moe.dispatch import (
    DISPATCHERS,
    capacity,
    chunks,
    dropless,
    dropless_rounds,
    levels,
    ragged,
)
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.layout import Shape
from moe_jax.moe.routing.contract import Routing
from moe_jax.parallel.mesh import P
from moe_jax.plan.hlo import program

SEVERAL = [shape for shape in meshes.ALL if shape[1] > 1]
RAGGED = {
    "ragged": dropless.Options(buffer=0.0, exchange="ragged"),
    "ragged in rounds": dropless.Options(buffer=1.0, exchange="ragged", check=True),
}
SLICES = {
    "slices": dropless.Options(buffer=0.0, exchange="gather", slices=2),
    "slices, ragged in rounds": dropless.Options(buffer=1.0, exchange="ragged", slices=2),
}
CHUNKS = {
    "dropless": ("dropless", dropless.Options(exchange="gather"), 4),
    "ragged": ("dropless", dropless.Options(buffer=1.0, exchange="ragged"), 2),
    "capacity": ("capacity", capacity.Options(factor=FACTOR), 2),
}


def variants(*options):
    return {name: ("dropless", one) for some in options for name, one in some.items()}


def test_equals_the_oracle(float64):
    """Two lines of `data`, whose devices need different numbers of rounds."""
    both = variants(RAGGED, SLICES)
    # One round is the first of several.
    del both["ragged"]
    check(both, (2, 4, 1))


@pytest.mark.full
@pytest.mark.parametrize("shape", SEVERAL, ids=meshes.name)
def test_equals_the_oracle_on_every_mesh(float64, shape):
    check(variants(RAGGED, SLICES), shape)


@pytest.mark.full
@pytest.mark.parametrize(
    ("shape", "num_experts", "k", "parts"),
    [
        ((2, 2, 2), 16, 2, 1),  # several experts of a device: several slices of a pair
        ((2, 4, 1), 4, 4, 2),  # every expert for every token
        ((1, 2, 1), 6, 5, 1),  # more choices than experts on a device
        ((1, 8, 1), 32, 1, 2),  # most experts without tokens
    ],
)
def test_equals_the_oracle_for_other_numbers_of_experts(float64, shape, num_experts, k, parts):
    check(variants(RAGGED, SLICES), shape, num_experts, k, parts)


ON_AXIS = P("expert")


def on_devices(body, *arrays):
    """`body` of one row of each array, on the devices of the expert axis."""

    def run(*rows):
        return body(*(row[0] for row in rows))[None]

    mapped = jax.shard_map(run, in_specs=ON_AXIS, out_specs=ON_AXIS)
    placed = (jax.device_put(jnp.asarray(z), ON_AXIS) for z in arrays)
    return jax.jit(mapped)(*placed)


# Chunks.


def test_chunks_equal_the_oracle(float64):
    """Two rows of a device, each a group: as many drop as without chunks."""
    check({name: CHUNKS[name] for name in ("ragged", "capacity")}, (1, 4, 1))


@pytest.mark.full
@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2)], ids=meshes.name)
def test_chunks_equal_the_oracle_on_every_mesh(float64, shape):
    check(CHUNKS, shape)


@pytest.mark.parametrize("form", ["order", "any order and number"])
def test_chunks_keep_priority_and_lists_of_any_order(float64, form):
    """Of a list with priorities of its own, and of one that is shuffled, the same is served."""
    num_rows, row_length, num_experts, k = 4, 8, 4, 2
    num_tokens = num_rows * row_length
    rng = np.random.default_rng(0)
    shape = Shape(
        num_experts,
        num_tokens,
        num_assignments=num_tokens * k,
        num_intended=num_tokens * k,
        per_token=k if form == "order" else 0,
        group_tokens=row_length,
        expert_axis=2,
    )
    token_N = np.repeat(np.arange(num_tokens, dtype=np.int32), k)
    expert_N = np.argsort(rng.random((2, num_tokens, num_experts)), -1)[..., :k].reshape(2, -1)
    gate_N, mixed_N = rng.random((2, num_tokens * k)), rng.permutation(num_tokens * k)
    mixed_N = mixed_N.astype(np.int32)
    x, factor = rng.normal(size=(2, num_tokens, 4)), np.arange(1.0, 5.0).reshape(2, 2)
    options = capacity.Options(factor=0.5)

    def both(x_TD, expert_N, gate_N, factor_e):
        listed = (jnp.asarray(token_N), expert_N, gate_N)
        if form == "order":
            routing = Routing(*listed, {}, k, order_N=jnp.asarray(mixed_N))
        else:
            routing = Routing(*(z[mixed_N] for z in listed), {}, 0)

        def grouped(x_RD, gate_R, start_e, size_e, block):
            # Each expert multiplies by a number of its own.
            row_R = jnp.arange(x_RD.shape[0], dtype=jnp.int32)
            expert_R = jnp.searchsorted(start_e, row_R, side="right") - jnp.int32(1)
            return x_RD * (gate_R * factor_e[expert_R])[:, None]

        results = [
            chunks.dispatched(
                DISPATCHERS["capacity"],
                *(x_TD, routing, Experts(grouped)),
                shape=shape,
                options=options,
                num_chunks=num_chunks,
            )
            for num_chunks in (1, 2)
        ]
        (y, dropped), (y_chunks, dropped_chunks) = results
        same = (jnp.abs(y - y_chunks).max() < 1e-12) & (dropped == dropped_chunks).all()
        return jnp.stack([same, dropped.any(), jnp.abs(y).max() > 0])

    with jax.set_mesh(meshes.make(1, 2, 1)):
        found = on_devices(both, x, expert_N.astype(np.int32), gate_N, factor)
    assert np.asarray(found).all()


# The exchange alone: n devices, m slices of every pair, R rows of C numbers sent, Q received.

N, M, R, Q, C = 4, 2, 12, 40, 3


def slices_of(group_size):
    """(sizes [N, group * M], their sources, their targets on the receivers) of every device.

    Sizes are 0 to 2; there are gaps between slices, in what is sent and what is received.
    """
    rng = np.random.default_rng(0)
    num = group_size * M
    size = rng.integers(0, 3, (N, num))
    size[0, 0] = 0
    source = np.minimum(np.cumsum(size, 1) - size + (np.arange(num) > 2), R - 1)
    size = np.minimum(size, R - source)
    # Every receiver has room for two rows of each sender's slice, in an order of its own.
    order = np.argsort(rng.random((N, num)), 1)
    target = np.zeros_like(size)
    for device in range(N):
        for i in range(num):
            receiver, place = i // M, i % M
            target[device, i] = 2 * order[receiver, device % group_size * M + place] + 1
    return size, source, target


def expected(x, output, size, source, target, groups):
    """What the documentation of jax.lax.ragged_all_to_all says, row by row."""
    result = output.copy()
    for group in groups:
        for sender in group:
            for i in range(len(group) * M):
                for row in range(size[sender, i]):
                    moved = x[sender, source[sender, i] + row]
                    result[group[i // M], target[sender, i] + row] = moved
    return result


def arriving(z, groups):
    """[N, S] of what each device receives, of what each device says of the slices it sends."""
    result = np.zeros_like(z)
    for group in groups:
        for receiver in range(len(group)):
            mine = slice(receiver * M, (receiver + 1) * M)
            result[group[receiver]] = np.concatenate([z[sender, mine] for sender in group])
    return result


@pytest.mark.parametrize("slices", [1, 2])
def test_the_twin_is_the_ragged_all_to_all_of_jax(float64, slices):
    """Against what its documentation says, with rows of `output` that nothing is written to."""
    _, level = levels.split(N, slices)
    groups = level.groups or [range(N)]
    size, source, target = (z.astype(np.int32) for z in slices_of(level.size))
    rng = np.random.default_rng(1)
    x, output = rng.normal(size=(N, R, C)), rng.normal(size=(N, Q, C))
    twin = functools.partial(ragged.twin, axis_name="expert", axis_index_groups=level.groups)
    with jax.set_mesh(meshes.make(1, N, 1)):
        got = on_devices(twin, x, output, source, size, target, arriving(size, groups))
    want = expected(x, output, size, source, target, groups)
    np.testing.assert_array_equal(got, want)
    assert (want != output).any() and (want == output).any()


def journey_of(size, source, target, groups):
    sent = (source, size, target)
    return sent + tuple(arriving(z, groups) for z in (target, size, source))


@pytest.mark.parametrize("slices", [1, 2])
def test_the_backward_pass_is_the_transpose(float64, slices):
    _, level = levels.split(N, slices)
    groups = level.groups or [range(N)]
    numbers = journey_of(*(z.astype(np.int32) for z in slices_of(level.size)), groups)
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(N, R, C)), rng.normal(size=(N, Q, C))

    def backward(x, dy, *numbers):
        journey = ragged.Journey(ragged.Slices(*numbers[:3]), ragged.Slices(*numbers[3:]))

        def exchanged(x):
            return ragged.exchange(x, journey, Q, level, check=True)

        return jax.vjp(exchanged, x)[1](dy)[0]

    with jax.set_mesh(meshes.make(1, N, 1)):
        dx = on_devices(backward, x, dy, *numbers)
    y = expected(x, np.zeros((N, Q, C)), *(numbers[i] for i in (1, 0, 2)), groups)
    np.testing.assert_allclose((np.asarray(dx) * x).sum(), (y * dy).sum(), rtol=1e-12)
    # No row is read that was not sent.
    sent = expected(np.ones_like(x), np.zeros((N, Q, C)), *(numbers[i] for i in (1, 0, 2)), groups)
    assert np.count_nonzero(dx) == np.count_nonzero(sent)


@pytest.mark.parametrize("when", ["never", "forward", "backward"])
def test_the_check_finds_rows_that_arrive_elsewhere(float64, monkeypatch, when):
    """Two rows are exchanged on one device: no sum over rows shows it, and the loss is finite."""
    _, level = levels.split(N, 1)
    numbers = journey_of(*(z.astype(np.int32) for z in slices_of(N)), [range(N)])
    right = ragged.twin

    def wrong(operand, output, *rest, **how):
        got = right(operand, output, *rest, **how)
        is_there = operand.shape[0] == (R if when == "forward" else Q)
        if when == "never" or not is_there:
            return got
        filled = jnp.argsort(jnp.abs(got).sum(1))[-2:]
        swapped = got.at[filled].set(got[filled[::-1]])
        return jnp.where(jax.lax.axis_index("expert") == 1, swapped, got)

    monkeypatch.setattr(ragged, "twin", wrong)
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(N, R, C)), rng.normal(size=(N, Q, C))

    def both(x, dy, *numbers):
        journey = ragged.Journey(ragged.Slices(*numbers[:3]), ragged.Slices(*numbers[3:]))
        y, pull = jax.vjp(lambda x: ragged.exchange(x, journey, Q, level, check=True), x)
        return jnp.stack([y.sum(), pull(dy)[0].sum()])

    with jax.set_mesh(meshes.make(1, N, 1)):
        y, dx = np.asarray(on_devices(both, x, dy, *numbers)).T
    assert np.isnan(y).all() == (when == "forward") and np.isnan(dx).all() == (when == "backward")
    assert np.isfinite(y).all() or when == "forward"


# Which way is taken, and what it costs.

SHAPE = Shape(
    8, 32, num_assignments=64, num_intended=64, per_token=2, group_tokens=4, expert_axis=4
)


@pytest.mark.parametrize(
    ("platform", "k", "is_ragged"),
    [("cpu", 2, False), ("tpu", 2, True), ("tpu", 4, False), ("gpu", 2, False)],
)
def test_the_way_is_chosen_by_platform_and_bytes(monkeypatch, platform, k, is_ragged):
    """Four devices: a gather receives 3 T rows, a ragged exchange k T 3/4."""
    monkeypatch.setattr(dropless, "platform", lambda: platform)
    shape = SHAPE._replace(num_assignments=32 * k, num_intended=32 * k, per_token=k)
    options = dropless.Options()
    assert dropless.is_ragged(shape, options) == is_ragged
    assert dropless.received(shape, options) == (24 * k if is_ragged else 96)
    assert dropless.is_ragged(shape, dropless.Options(exchange="ragged"))
    assert not dropless.is_ragged(shape._replace(expert_axis=1), dropless.Options())


def test_accelerators_hold_a_balanced_buffer_by_default(monkeypatch):
    """1.25 times 64 rows, in whole blocks; on a CPU the worst case, 256 rows and two rooms."""
    assert dropless.rows(SHAPE, dropless.Options()) == dropless_rounds.worst(SHAPE) >= 256
    monkeypatch.setattr(dropless, "platform", lambda: "tpu")
    assert 80 <= dropless.rows(SHAPE, dropless.Options()) < 80 + 32
    assert dropless.rows(SHAPE, dropless.Options(buffer=0.0)) == dropless_rounds.worst(SHAPE)


def test_levels_of_an_axis():
    """Four devices of two slices: 0, 1 and 2, 3 lie together."""
    slow, fast = levels.split(4, 2)
    assert slow == (2, 2, ((0, 2), (1, 3))) and fast == (2, 1, ((0, 1), (2, 3)))
    assert levels.split(4, 1) == levels.split(4, 3) == ((1, 4, None), (4, 1, None))
    assert levels.split(4, 4) == ((4, 1, ((0, 1, 2, 3),)), (1, 1, ((0,), (1,), (2,), (3,))))


def test_bytes_of_each_level(float64):
    """Four devices in two slices, T = 8 tokens of each: by a gather 3 T tokens come to a device,
    and as many sums are added up; 2 T of them cross, or T where slices are told. Beside a token
    travel a number, an expert and a gate for each of its k choices.
    """
    tokens, numbers = B * S // 4 * D * 8, B * S // 4 * K * (4 + 4 + 8)
    crossing = {}
    with jax.set_mesh(meshes.make(1, 4, 1)):
        lengths = dict(jax.sharding.get_mesh().shape)
        for slices in (1, 2):
            options = dropless.Options(exchange="gather", slices=slices)
            text = forward(("dropless", options)).as_text()
            found = program.read(text, lengths, domains=[0, 0, 1, 1]).collectives
            assert sum(one.num_bytes for one in found) == 3 * (2 * tokens + numbers)
            crossing[slices] = sum(one.far for one in found)
    assert crossing == {1: 2 * (2 * tokens + numbers), 2: 2 * tokens + numbers}
