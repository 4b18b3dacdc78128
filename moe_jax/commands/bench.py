"""Times the training steps of several variants of a config against each other, interleaved.

    python -m moe_jax bench --config bench --rounds 15 --variant e8: \
        --variant "e64 capacity: --config.model.moe.num_experts=64 \
        --config.model.moe.dispatcher=capacity"

Keys that are changed outside of a variant are changed in all.

Every round runs one step of each variant in turn on the same random tokens, so that a machine that
changes its speed changes it for all. Reported are medians, and the median over rounds of each
step's time over that of the first variant.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax import config
from moe_jax.config import command_line
from moe_jax.errors import UserError
from moe_jax.parallel import batch_rows, mesh
from moe_jax.plan import flops
from moe_jax.runtime import shell
from moe_jax.tasks import TASKS
from moe_jax.terminal import working
from moe_jax.terminal.table import Table, names, numbers
from moe_jax.train_step import initial, make_model, make_step, make_tx


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--variant",
        action="append",
        required=True,
        help="'NAME: --config.KEY=VALUE --config.KEY=VALUE'; the first is the reference",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="steps of each variant that are timed (default 15)"
    )
    return command_line.parse(parser, argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    variants = {}
    for text in args.variant:
        name, changes = command_line.named(text, "--variant")
        try:
            variants[name] = command_line.read(args.config, [*args.changes, *changes])
            # Built to be refused: all of them, before the first is compiled.
            config.build(variants[name], len(jax.devices()))
        except UserError as error:
            raise UserError(f"--variant {name}: {error}" if changes else str(error)) from None
    runs = {}
    with working.shown("bench") as tell:
        for name, raw in variants.items():
            tell(f"compiling {name}")
            runs[name] = prepare(raw)
    # No spinner from here on: its thread would be timed too.
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, (_, step) in runs.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    shell.console().print(table({name: cfg for name, (cfg, _) in runs.items()}, times))
    return 0


def prepare(raw: Mapping[str, Any]) -> tuple[config.Config, Callable[[], None]]:
    """Returns the frozen config of a variant, and a function that runs one step of it.

    Two steps have run, so nothing is left to compile.
    """
    cfg = config.build(raw, len(jax.devices()))
    devices = mesh.make(cfg.mesh)
    with jax.set_mesh(devices):
        model = make_model(cfg.model)
        state = jax.jit(initial(cfg, model))(jax.random.key(cfg.seed))
        step_fn = jax.jit(make_step(cfg, model, make_tx(cfg, state.params)), donate_argnums=0)
        batch_size = cfg.train.batch_size
        rows = batch_rows.local_rows(batch_size)
        local = jax.tree.map(lambda z: z[rows], TASKS[cfg.task].random(cfg, 0))
        batch = batch_rows.put(local, rows, batch_size)

    def step() -> None:
        nonlocal state
        with jax.set_mesh(devices):
            state, metrics = step_fn(state, batch)
            jax.block_until_ready(metrics)

    step()
    step()
    return cfg, step


def table(configs: dict[str, config.Config], times: dict[str, list[float]]) -> Table:
    columns = numbers("ms a step", "fastest", "tokens/s", "time / first", "active", "total")
    result = Table([*names("variant"), *columns])
    reference = next(iter(times.values()))
    for name, seconds in times.items():
        cfg, median = configs[name], statistics.median(seconds)
        counts = flops.parameters(cfg.model)
        tokens = cfg.train.batch_size * cfg.data.seq_len
        # Round by round, so that a machine that slows down does not change it.
        ratio = statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
        result.add(
            name,
            f"{1000 * median:.0f}",
            f"{1000 * min(seconds):.0f}",
            f"{tokens / median:.0f}",
            f"{ratio:.2f}",
            f"{counts.active / 1e6:.2f} M",
            f"{counts.total / 1e6:.2f} M",
        )
    return result
