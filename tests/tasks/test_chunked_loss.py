"""The loss in chunks against the loss of whole logits: values, gradients, greedy tokens, memory."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny

from moe_jax.models.ends import Hidden
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.tasks import TASKS, chunked_loss, next_token

B, S, D, V = 4, 6, 5, 8
MESHES = [(1, 1, 1), (2, 2, 2), (1, 2, 4), (2, 1, 1)]


def arrays():
    random = np.random.default_rng(0)
    x = random.normal(size=(B, S, D))
    # One token is nearly certain, one nearly impossible: exponentials alone would overflow.
    x[0, 0] *= 1000
    head = random.normal(size=(D, V))
    # Two tokens with the same logits: the first of them is the likeliest, on whichever device.
    head[:, 6] = head[:, 1]
    target = random.integers(0, V, (B, S)).astype(np.int32)
    return x, head, target, random.normal(size=(2, B, S))


def objective(losses, weight):
    nll_BS, log_sum_BS = losses
    return (nll_BS * weight[0] + jnp.square(log_sum_BS) * weight[1]).sum()


def plain(x, head, target, cap=0.0):
    logits = jnp.einsum("bsd,dv->bsv", x, head)
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    return log_sum - jnp.take_along_axis(logits, target[..., None], -1)[..., 0], log_sum


@pytest.mark.parametrize(
    ("chunk", "cap"), [(1, 0.0), (4, 0.0), (5, 0.0), (6, 0.0), (5, 2.0)], ids=str
)
@pytest.mark.parametrize("shape", MESHES, ids=meshes.name)
def test_it_is_the_loss_of_whole_logits(float64, shape, chunk, cap):
    x, head, target, weight = arrays()

    def run(x, head, target, weight):
        *losses, best = chunked_loss.of_hidden(Hidden(x, head), target, chunk, True, cap)
        return objective(losses, weight), (*losses, best)

    specs = P(BATCH), P(None, "model"), P(BATCH), P(None, BATCH)
    with jax.set_mesh(meshes.make(*shape)):
        mesh = jax.sharding.get_mesh()
        placed = [
            jax.device_put(z, jax.NamedSharding(mesh, s))
            for z, s in zip((x, head, target, weight), specs)
        ]
        (_, got), gradient = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(*placed)
    want = plain(x, head, target, cap)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    # Where a cap makes ties of large logits, the first of them is the likeliest.
    capped = cap * np.tanh(x @ head / cap) if cap else x @ head
    np.testing.assert_array_equal(got[2], np.argmax(capped, -1))

    def of_plain(x, head):
        return objective(plain(x, head, target, cap), weight)

    wanted = jax.grad(of_plain, (0, 1))(x, head)
    for a, b in zip(gradient, wanted):
        np.testing.assert_allclose(a, b, atol=1e-9 * np.abs(b).max())


def test_narrow_dtypes_stay_near_and_keep_their_dtype():
    x, head, target, weight = arrays()
    x[0, 0] /= 1000
    x, head = jnp.asarray(x, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    weight = jnp.asarray(weight, jnp.float32)

    def run(x, head):
        *losses, _ = chunked_loss.of_hidden(Hidden(x, head), jnp.asarray(target), 5, False)
        return objective(losses, weight)

    with jax.numpy_dtype_promotion("strict"):
        value, gradient = jax.jit(jax.value_and_grad(run, (0, 1)))(x, head)
    assert value.dtype == jnp.float32 and [z.dtype for z in gradient] == [jnp.bfloat16] * 2
    wide = x.astype(jnp.float32), head.astype(jnp.float32)
    wanted = jax.grad(lambda x, h: objective(plain(x, h, target), weight), (0, 1))(*wide)
    for a, b in zip(gradient, wanted):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize(
    ("task", "shape"),
    [("lm", (2, 2, 2)), pytest.param("translation", (1, 1, 1), marks=pytest.mark.full)],
)
def test_a_step_does_not_depend_on_the_chunk(float64, task, shape):
    """With a z-loss and a cap on logits, whose whole forms are others."""
    changes = {"task": task, "model.logit_z_loss": 0.1, "model.repeats": 1}
    # First logits have a standard deviation of 0.1.
    changes |= {"model.logit_cap": 0.2}
    if task == "translation":
        changes |= {"model.kind": "encdec", "model.kinds.encdec.encoder_repeats": 1}
    rows = []
    for chunk in (0, 3):
        program = tiny.Program(shape, {**changes, "model.loss_chunk": chunk})
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(0))
            batch = tiny.put(program.cfg, TASKS[task].random(program.cfg, 0))
            state, metrics = program.step(state, batch)
        rows.append((jax.device_get(metrics), jax.device_get(state.params)))
    (whole, params), (chunked, chunked_params) = rows
    for name in ("loss", "nll", "logit_z_loss", "grad_norm"):
        np.testing.assert_allclose(chunked[name], whole[name], rtol=1e-11, err_msg=name)
    np.testing.assert_allclose(whole["loss"] - whole["nll"], whole["logit_z_loss"], rtol=0.5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(chunked_params)):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_few_logits_are_whole_and_many_are_not():
    def chunk(vocab_size, tokens, loss_chunk=0):
        cfg = tiny.build(
            (1, 1, 1), {"model.vocab_size": vocab_size, "model.loss_chunk": loss_chunk}
        )
        return next_token.chunk_tokens(cfg.model, tokens)

    # The size of the benchmark.
    assert chunk(4096, 2048) == 0
    assert chunk(131072, 8192) == 128
    assert chunk(4096, 2048, 100) == 100
    assert chunk(4096, 64, 100) == 0


def test_memory_is_that_of_one_chunk():
    """Beside x, the head and their gradients there are the logits of a chunk."""

    def temporary(num_tokens, vocab_size, chunk):
        def run(x, head, target):
            nll, *_ = chunked_loss.of_hidden(Hidden(x, head), target, chunk, False)
            return nll.sum()

        shapes = ((1, num_tokens, 8), jnp.float32), ((8, vocab_size), jnp.float32)
        target = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        compiled = jax.jit(jax.grad(run, (0, 1))).lower(*args, target).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 2048 * 4096
    # 4 times the tokens, as many logits at a time.
    few, many = temporary(512, 4096, 64), temporary(2048, 4096, 64)
    assert few < many < few + whole / 16
    assert temporary(2048, 4096, 2048) >= whole
    assert many < whole / 4
