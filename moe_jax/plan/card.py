"""The resource card of a config, `--dry_run`: parameters, FLOPs, memory and traffic, before
anything is allocated.

Counts and shards are exact, the compiler's figures are those of the step that training runs, for
the platform of these devices. What is an estimate says so. Everything is abstract: the card costs
the compilation and no memory. card_tables.py shows it.
"""

import time
from typing import Any, NamedTuple

import jax

from moe_jax import train_step
from moe_jax.parallel.mesh import Lengths, of
from moe_jax.plan import dispatch, flops
from moe_jax.plan.abstract import abstract_batch, shard_bytes
from moe_jax.plan.dispatch import Dispatch
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS


class Memory(NamedTuple):
    """Bytes on one device, from the shardings; every device holds as much."""

    parameters: int
    # As many as the parameters, within the compiler's `temporary`.
    gradients: int
    optimizer: int
    ema: int
    # The copy in float32 of optim.master_copy.
    master: int


class Compiled(NamedTuple):
    """Bytes of the compiled train step on one device, and seconds that compiling it took."""

    argument: int
    output: int
    # Of the output: written over a donated argument.
    alias: int
    # Gradients, activations and buffers, for as long as the step runs.
    temporary: int
    seconds: float

    @property
    def peak(self) -> int:
        """The most bytes that are taken at once, as the compiler plans it."""
        return self.argument + self.output - self.alias + self.temporary


class Card(NamedTuple):
    """All that is shown of a config before it runs."""

    platform: str
    mesh: Lengths
    # Dense ones and MoE ones.
    num_layers: tuple[int, int]
    batch_size: int
    seq_len: int
    num_micro_batches: int
    parameters: flops.Counts
    # FLOPs per token.
    forward: flops.Breakdown
    # FLOPs of a training step, per token and whole.
    train_per_token: int
    train_per_step: int
    memory: Memory
    dispatcher: str
    # None without MoE layers.
    dispatch: Dispatch | None
    compiled: Compiled

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


def card(cfg: Config) -> Card:
    """Returns the card of a config on the current mesh.

    Compiles the train step once; allocates nothing on the devices.
    """
    model, seq_len = cfg.model, cfg.data.seq_len
    functions = train_step.make_model(model)
    abstract_state = jax.eval_shape(train_step.initial(cfg, functions), jax.random.key(0))
    mesh = jax.sharding.get_mesh()
    train_per_token = flops.train_per_token(model, seq_len)
    return Card(
        platform=mesh.devices.flat[0].device_kind,
        mesh=of(mesh),
        num_layers=(model.num_dense_layers, model.num_moe_layers),
        batch_size=cfg.train.batch_size,
        seq_len=seq_len,
        num_micro_batches=cfg.train.num_micro_batches,
        parameters=flops.parameters(model),
        forward=flops.forward_per_token(model, seq_len),
        train_per_token=train_per_token,
        train_per_step=train_per_token * cfg.train.batch_size * seq_len,
        memory=_memory(abstract_state),
        dispatcher=model.moe.dispatcher,
        dispatch=dispatch.of_layer(cfg) if model.num_moe_layers else None,
        compiled=_compiled(cfg, functions, abstract_state),
    )


def _memory(abstract_state: train_step.State) -> Memory:
    """Returns the bytes of the parts of a state on one device."""
    parameters = shard_bytes(abstract_state.params)
    return Memory(
        parameters=parameters,
        gradients=parameters,
        optimizer=shard_bytes(abstract_state.opt_state),
        ema=shard_bytes(abstract_state.ema),
        master=shard_bytes(abstract_state.master),
    )


def _compiled(cfg: Config, model: train_step.Model, abstract_state: train_step.State) -> Compiled:
    """Compiles the train step and returns what the compiler says of it."""
    start = time.perf_counter()
    optimizer = train_step.make_tx(cfg, abstract_state.params)
    # The state is donated, as in training: the new one is written over it.
    step = jax.jit(train_step.make_step(cfg, model, optimizer), donate_argnums=0)
    batch = abstract_batch(TASKS[cfg.task].random(cfg, 0))
    stats: Any = step.lower(abstract_state, batch).compile().memory_analysis()
    return Compiled(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        seconds=time.perf_counter() - start,
    )
