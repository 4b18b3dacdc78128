"""Prints what the kernels cost, as compilers tell it: nothing is run.

    PYTHONPATH=. python tools/kernel_figures.py attention
    PYTHONPATH=. python tools/kernel_figures.py attention --topology v5e:2x2
    PYTHONPATH=. python tools/kernel_figures.py loss
    PYTHONPATH=. python tools/kernel_figures.py experts --topology v6e:2x2

Each row is one compilation, forward and backward, and its temporary memory. Without a topology it
is for this machine's platform; with one it is for a TPU that is described (libtpu must be
installed: pip install libtpu). JAX_PLATFORMS=cpu, where the machine has another. The shapes stand
in the functions.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

# Read when libtpu loads: it then looks for no TPU, and does not mind another process that has it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from moe_jax.models.attention_core import attention, causal
from moe_jax.models.ends import Hidden, logits
from moe_jax.moe.experts.blocks import block_sizes
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.tasks.chunked_loss import of_hidden
from moe_jax.tasks.cross_entropy import negative_log_likelihood
from moe_jax.tasks.next_token import CHUNK_LOGITS
from moe_jax.terminal.table import Table, names, numbers


def megabytes(run: Callable[..., Any], *args: Any) -> int:
    """Returns the temporary memory of a compiled function in MB (10^6 bytes)."""
    compiled = jax.jit(run).lower(*args).compile()
    return round(compiled.memory_analysis().temp_size_in_bytes / 1e6)


def of_attention(array: Callable[..., Any]) -> Table:
    """One row, 8 heads of 128, bfloat16, causal."""
    table = Table([*names("tokens of a row"), *numbers("auto", "blocks")])
    for S in (2048, 4096, 8192, 16384):
        q, segment = array((1, S, 8, 128)), array((1, S), jnp.int32)
        cells = []
        for kernel in ("auto", "blocks"):

            def run(q: Any, k: Any, v: Any, segment: Any, kernel: str = kernel) -> Any:
                def forward(q: Any, k: Any, v: Any) -> Any:
                    return attention(q, k, v, causal(segment), scale=0.1, kernel=kernel)

                o, pull = jax.vjp(forward, q, k, v)
                return o, pull(o)

            cells.append(str(megabytes(run, q, q, q, segment)))
        table.add(f"{S:,}", *cells)
    return table


def of_loss(array: Callable[..., Any]) -> Table:
    """Rows of 4,096 tokens, width 256, float32; the gradients of tokens and head are results."""
    table = Table([*names("tokens", "vocabulary"), *numbers("in chunks", "whole logits")])

    def in_chunks(x: Any, head: Any, target: Any) -> Any:
        chunk = CHUNK_LOGITS // head.shape[1]
        return of_hidden(Hidden(x, head), target, chunk, False)[0].sum()

    def whole(x: Any, head: Any, target: Any) -> Any:
        return negative_log_likelihood(logits(Hidden(x, head), 0.0), target).sum()

    for num_rows, V in ((2, 32768), (4, 32768), (4, 131072)):
        x = array((num_rows, 4096, 256), jnp.float32)
        args = x, array((256, V), jnp.float32), array((num_rows, 4096), jnp.int32)
        cells = [str(megabytes(jax.grad(f, (0, 1)), *args)) for f in (in_chunks, whole)]
        table.add(f"{num_rows * 4096:,}", f"{V:,}", *cells)
    return table


def of_experts(array: Callable[..., Any]) -> Table:
    """8,192 rows in all, width 1,024, hidden 2,048, SwiGLU, bfloat16."""
    kernels = ("auto", "tiles", "ragged_dot")
    table = Table([*names("experts"), *numbers(*kernels), *numbers("gradients of weights")])
    R, D, F = 8192, 1024, 2048
    for E in (8, 32):
        w_in, w_out = array((E, D, 2, F)), array((E, F, D))
        args = array((R, D)), array((R,)), *[array((E,), jnp.int32)] * 2, w_in, w_out
        block = block_sizes(R / E)
        cells = [str(megabytes(_both_ways(kernel, block), *args)) for kernel in kernels]
        # In float32, in which they are added up.
        table.add(str(E), *cells, str(round(4 * (w_in.size + w_out.size) / 1e6)))
    return table


def _both_ways(kernel: str, block: tuple[int, int]) -> Callable[..., Any]:
    """Returns the experts' network forward and backward, by one kernel."""

    def run(x: Any, gate: Any, start: Any, size: Any, w_in: Any, w_out: Any) -> Any:
        def forward(x: Any, gate: Any, w_in: Any, w_out: Any) -> Any:
            rows = (x, gate, start, size, w_in, w_out)
            return expert_ffn(*rows, activation="swiglu", block=block, kernel=kernel)

        y, pull = jax.vjp(forward, x, gate, w_in, w_out)
        return y, pull(y)

    return run


TABLES = {"attention": of_attention, "loss": of_loss, "experts": of_experts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("--topology", default="", help="of a TPU, as in v5e:2x2")
    flags = parser.parse_args()
    sharding = None
    if flags.topology:
        described = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology)
        sharding = jax.sharding.SingleDeviceSharding(described.devices[0])

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    print(TABLES[flags.what](array).markdown())


if __name__ == "__main__":
    main()
