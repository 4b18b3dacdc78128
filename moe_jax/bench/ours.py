"""Our own jobs: training steps, decoding, the MoE layer alone, compilation, matrix products.

Shapes: T tokens of a batch, D model.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import config, optim
from moe_jax.bench.contract import Job, Prepared
from moe_jax.config import command_line
from moe_jax.decoding import sample
from moe_jax.decoding.draw import Settings
from moe_jax.errors import UserError
from moe_jax.models.block import moe_config
from moe_jax.models.decodable import for_decoding, why_not_decoded
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.parallel import batch_rows, compile_cache, mesh
from moe_jax.plan import flops
from moe_jax.plan.abstract import abstract_batch
from moe_jax.tasks import TASKS
from moe_jax.train_step import initial, jit_initial, jit_step, make_model, make_tx

# Side of the square matrices of the peak: rows and widths of a training step are as large.
PRODUCT = 2048
# Steps before the first that is timed, so that nothing is left to compile or to allocate.
WARM = 2
# How often the norms of a logged step are taken, of which the median is told.
LOGGED = 9


def read(job: Job) -> config.Config:
    """Returns the config of a job; its devices are there afterwards."""
    raw = command_line.read(Path(job.config), list(job.changes))
    if raw["simulate_devices"]:
        mesh.simulate(raw["simulate_devices"])
    return config.build(raw, len(jax.devices()))


def train(job: Job) -> Prepared:
    """Prepares one optimizer step on random tokens."""
    cfg = read(job)
    devices = mesh.make(cfg.mesh, slow_axis=cfg.mesh_slow_axis)
    with jax.set_mesh(devices):
        model = make_model(cfg.model)
        state = jit_initial(cfg, model)(jax.random.key(cfg.seed))
        step_fn = jit_step(cfg, model, make_tx(cfg, state.params))
        batch_size = cfg.train.batch_size
        rows = batch_rows.local_rows(batch_size)
        local = jax.tree.map(lambda z: z[rows], TASKS[cfg.task].random(cfg, 0))
        # The same batch for every step: the bench times computation, not data.
        batch = batch_rows.put(local, rows, batch_size)

    losses: list[float] = []

    def step() -> None:
        nonlocal state
        with jax.set_mesh(devices):
            state, metrics = step_fn(state, batch)
            # Reading the loss waits for the step.
            losses.append(float(metrics["loss"]))

    for _ in range(WARM):
        step()
    with jax.set_mesh(devices):
        logged = _seconds_of_logging(state.params)
    counts = flops.parameters(cfg.model)
    tokens = cfg.train.batch_size * cfg.data.seq_len
    facts = {
        "loss": losses[0],
        "logged": logged,
        "dtype": cfg.model.dtype,
        "tokens": tokens,
        "flops": tokens * flops.train_per_token(cfg.model, cfg.data.seq_len),
        "active": counts.active,
        "total": counts.total,
    }
    return Prepared(facts, step)


def _seconds_of_logging(params: Any) -> float:
    """Returns the seconds that a logged step takes more: parameters are copied before it, and the
    norms of them and of their update are taken behind it.
    """
    copied = jax.jit(optim.copied)
    norms = jax.jit(optim.norms)

    def once() -> float:
        start = time.perf_counter()
        before = jax.block_until_ready(copied(params))
        jax.block_until_ready(norms(params, before))
        return time.perf_counter() - start

    # The first one compiles.
    return statistics.median([once() for _ in range(LOGGED)][1:])


def compilation(job: Job) -> Prepared:
    """Measures, once, the compilation of the step: its facts have the seconds.

    Option: cache, a folder of compiled programs.
    """
    cfg = read(job)
    cache = compile_cache.CompileCache(job.options["cache"])
    with jax.set_mesh(mesh.make(cfg.mesh, slow_axis=cfg.mesh_slow_axis)):
        model = make_model(cfg.model)
        key = jax.random.key(cfg.seed)
        start = time.perf_counter()
        state = jax.eval_shape(initial(cfg, model), key)
        step = jit_step(cfg, model, make_tx(cfg, state.params))
        # Shapes alone: nothing is computed, so tracing and compiling are all that is timed.
        batch = abstract_batch(TASKS[cfg.task].random(cfg, 0))
        lowered = step.lower(state, batch)
        traced = time.perf_counter()
        lowered.compile()
        done = time.perf_counter()
    # An entry that is younger is not trusted yet.
    time.sleep(compile_cache.SETTLED)
    cache.keep()
    return Prepared({"trace": traced - start, "compile": done - traced}, _nothing)


def decode(job: Job) -> Prepared:
    """Prepares the greedy continuation of random prompts, their prefill included.

    Options: batch, prompt and new, the numbers of rows, of tokens of a prompt, and of tokens that
    are drawn for each row.
    """
    return decoding(read(job), job.options)


def decoding(cfg: config.Config, options: Mapping[str, Any]) -> Prepared:
    """Prepares decoding as `decode` does, of a config and the same options."""
    if reason := why_not_decoded(cfg.model):
        raise UserError(reason)
    model_cfg = for_decoding(cfg.model)
    num_rows, prompt, new = (options[name] for name in ("batch", "prompt", "new"))
    devices = mesh.make(cfg.mesh, slow_axis=cfg.mesh_slow_axis)
    with jax.set_mesh(devices):
        model = make_model(model_cfg)
        weights = jax.jit(model.init)(jax.random.key(cfg.seed))
        # As much of a tokenizer, and below of a row, as the loop asks for.
        tokenizer: Any = _Endless(cfg.model.vocab_size)
        engine = sample.make_engine(model_cfg, tokenizer)
    # Temperature 0: greedy.
    settings = Settings(new, 0.0, 0, 1.0, 0, ())
    length = sample.cache_length(prompt + new)
    ids = np.random.default_rng(cfg.seed).integers(1, cfg.model.vocab_size, (num_rows, prompt))

    def run() -> None:
        with jax.set_mesh(devices):
            rows: Any = [_Prompt(i, list(row), new) for i, row in enumerate(ids)]
            sample.generate(engine, weights, rows, num_rows, length, settings)

    # Once before the rounds, so that nothing is left to compile.
    run()
    return Prepared({"tokens": num_rows * new}, run)


class _Endless(NamedTuple):
    """A tokenizer as far as the loop of decoding asks it: no token of it ends a text."""

    vocab_size: int
    boundary_id: int = -1


class _Prompt:
    """A prompt of ids, as `sample.Row` is of text."""

    def __init__(self, index: int, window: list[int], left: int):
        self.index, self.window, self.left = index, window, left
        self.count = 0

    @property
    def ended(self) -> bool:
        return self.left == 0

    def take(self, ids: list[int]) -> None:
        self.window += ids
        self.count += len(ids)
        self.left -= len(ids)


def layer(job: Job) -> Prepared:
    """Prepares the MoE layer alone, forward and backward, on random activations.

    Options: collapsed, whether every token chooses the same experts. A router whose weights are all
    zero does so, for equal scores go to the first experts.
    """
    cfg = read(job)
    num_rows, row_length = cfg.train.batch_size, cfg.data.seq_len
    x_BSD = jax.random.normal(jax.random.key(1), (num_rows, row_length, cfg.model.d_model))
    batch = Batch(
        id_BS=jnp.ones((num_rows, row_length), jnp.int32),
        position_BS=jnp.tile(jnp.arange(row_length, dtype=jnp.int32), (num_rows, 1)),
        segment_BS=jnp.ones((num_rows, row_length), jnp.int32),
        row_B=jnp.arange(num_rows, dtype=jnp.int32),
    )
    devices = mesh.make(cfg.mesh, slow_axis=cfg.mesh_slow_axis)
    with jax.set_mesh(devices):
        batch, x_BSD = jax.tree.map(
            lambda z: jax.device_put(z, mesh.sharding("batch", *[None] * (z.ndim - 1))),
            (batch, x_BSD),
        )
        module = MoELayer(jax.random.key(cfg.seed), moe_config(cfg.model))
        graph, weights = nnx.split(module)
        if job.options["collapsed"]:
            weights["router"] = jax.tree.map(jnp.zeros_like, weights["router"])

        def loss(weights: Any, x_BSD: jax.Array) -> jax.Array:
            y_BSD, _ = nnx.merge(graph, weights)(x_BSD, batch, jax.random.key(0), True)
            # A cotangent that differs from place to place; that of a plain sum is 1 everywhere.
            return jnp.sum(y_BSD * x_BSD)

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))

    def run() -> None:
        with jax.set_mesh(devices):
            jax.block_until_ready(gradients(weights, x_BSD))

    for _ in range(WARM):
        run()
    return Prepared({"tokens": num_rows * row_length}, run)


def product(job: Job) -> Prepared:
    """Prepares the product of two square matrices, which stands for the peak. Option: dtype."""
    dtype = job.options["dtype"]
    x = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT), dtype)
    multiply = jax.jit(jnp.matmul)

    def run() -> None:
        jax.block_until_ready(multiply(x, x))

    for _ in range(WARM):
        run()
    # A product of n x n matrices is n^3 multiplications and as many additions.
    return Prepared({"flops": 2 * PRODUCT**3}, run)


def _nothing() -> None:
    """Does what a job that is measured while it is prepared has left to do."""


PREPARE: dict[str, Callable[[Job], Prepared]] = {
    "train": train,
    "compilation": compilation,
    "decode": decode,
    "layer": layer,
    "product": product,
}
