"""What do sparse inputs cost? Embedding bags against dense one-hot and multi-hot products, as the
vocabulary grows from 10^3 to 10^6.

    # 15 runs, some minutes on two cores; trains nothing; goes on where it stopped
    python -m experiments.sparse_inputs

Hypothesis: a dense product costs time and memory in proportion to the vocabulary, and a bag in
proportion to the items of a row, until its gradient is written as a table of the vocabulary's size;
then that, too, grows with the vocabulary, and only an update of the touched rows does not.

Rows are like those of a recommender: 256 rows of about 10 items (Poisson, at least 1), items by
Zipf's law, a table of width 64, float32.

    one-hot      one_hot(items)[B, L, V] @ table, summed over the items of a row: made in the
                 program from padded ids
    multi-hot    rows as counts [B, V] @ table: the matrix comes as an argument
    bag          moe_jax.models.mmoe.embedding_bag: rows of the table gathered and summed by segment

A run is a vocabulary and a seed (of the rows). Its programs are timed in turn, so that a machine
that changes its speed changes it for all; medians of rounds, then of seeds, with the lowest and the
highest seed. Memory is what the compiler reserves (arguments, results, temporary arrays), and the
process' peak. What would take more than 2 GB is not run, and nothing is extrapolated.
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plots, writing
from experiments.command_line import Flags, launch, made
from moe_jax.errors import UserError
from moe_jax.models.mmoe import embedding_bag

VOCABULARIES = (1_000, 10_000, 100_000, 300_000, 1_000_000)
ROWS, ITEMS, WIDTH = 256, 10, 64
SEEDS = (0, 1, 2)
LIMIT = 2e9  # bytes
RATE = 0.1
ROUNDS = 15


Figures = dict[
    str, list[dict[str, dict[str, Any]]]
]  # by vocabulary: of each seed {program: {"ms", "MB", "peak MB"}}


class Bags(NamedTuple):
    """N (item, row) pairs; and the same padded to the longest row, -1 = nothing."""

    item_N: Any
    row_N: Any
    padded_BL: Any


def draw_bags(vocabulary: int, seed: int) -> Bags:
    """Items by Zipf's law, P(i) ~ 1 / (i + 1); one that comes twice in a row counts twice."""
    rng = np.random.default_rng(seed)
    count_B = np.maximum(rng.poisson(ITEMS, ROWS), 1)
    total = np.cumsum(1 / np.arange(1, vocabulary + 1))
    item_N = np.searchsorted(total / total[-1], rng.random(count_B.sum())).astype(np.int32)
    row_N = np.repeat(np.arange(ROWS, dtype=np.int32), count_B)
    padded_BL = np.full((ROWS, count_B.max()), -1, np.int32)
    padded_BL[row_N, np.arange(len(row_N)) - (np.cumsum(count_B) - count_B)[row_N]] = item_N
    return Bags(item_N, row_N, padded_BL)


def multi_hot(bags: Bags, vocabulary: int) -> np.ndarray:
    x_BV = np.zeros((ROWS, vocabulary), np.float32)
    np.add.at(x_BV, (bags.row_N, bags.item_N), 1)
    return x_BV


# Forward, [B, D] each, from a table [V, D] and what the way needs of the rows.


def by_one_hot(table_VD: jax.Array, padded_BL: jax.Array) -> jax.Array:
    return jnp.einsum("BLV,VD->BD", jax.nn.one_hot(padded_BL, table_VD.shape[0]), table_VD)


def by_multi_hot(table_VD: jax.Array, x_BV: jax.Array) -> jax.Array:
    return x_BV @ table_VD


def by_bag(table_VD: jax.Array, item_N: jax.Array, row_N: jax.Array) -> jax.Array:
    return embedding_bag(table_VD, item_N, row_N, jnp.ones(item_N.shape), ROWS)


FORWARD: dict[str, Callable[..., jax.Array]] = {
    "one-hot": by_one_hot,
    "multi-hot": by_multi_hot,
    "bag": by_bag,
}


def loss(y_BD: jax.Array, target_BD: jax.Array) -> jax.Array:
    return jnp.square(y_BD - target_BD).sum() / ROWS


def gradient(forward: Callable) -> Callable:
    """(table, target, rows) -> (loss, the table's gradient [V, D])"""
    return jax.value_and_grad(lambda table, target, *rows: loss(forward(table, *rows), target))


def dense_update(forward: Callable) -> Callable:
    """(table, target, rows) -> (loss, the table after a step of SGD), through a gradient of the
    table's size.
    """

    def step(table: jax.Array, target: jax.Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, grad = gradient(forward)(table, target, *rows)
        return value, table - RATE * grad

    return step


def touched_update(
    table: jax.Array, target: jax.Array, item_N: jax.Array, row_N: jax.Array
) -> tuple:
    """The same step by the rows that were looked up alone: their gradients are subtracted where
    they came from.
    """

    def of_looked_up(x_ND):
        return loss(jax.ops.segment_sum(x_ND, row_N, num_segments=ROWS), target)

    value, grad_ND = jax.value_and_grad(of_looked_up)(table.at[item_N].get())
    return value, table.at[item_N].add(-RATE * grad_ND)


# (name, function, donate the table): a step keeps no second table, a gradient is a result of its
# own.
PROGRAMS: dict[str, tuple[str, Callable, bool]] = {
    "gradient, one-hot": ("one-hot", gradient(by_one_hot), False),
    "gradient, multi-hot": ("multi-hot", gradient(by_multi_hot), False),
    "gradient, bag": ("bag", gradient(by_bag), False),
    "step, multi-hot": ("multi-hot", dense_update(by_multi_hot), True),
    "step, bag": ("bag", dense_update(by_bag), True),
    "step, bag, touched rows": ("bag", touched_update, True),
}


def shapes(way: str, bags: Bags, vocabulary: int) -> list[tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of what a way needs of the rows."""
    return {
        "one-hot": [(bags.padded_BL.shape, np.int32)],
        "multi-hot": [((ROWS, vocabulary), np.float32)],
        "bag": [(bags.item_N.shape, np.int32), (bags.row_N.shape, np.int32)],
    }[way]


def rows_of(way: str, bags: Bags, vocabulary: int) -> list[Any]:
    if way == "one-hot":
        return [bags.padded_BL]
    return [multi_hot(bags, vocabulary)] if way == "multi-hot" else [bags.item_N, bags.row_N]


def compiled(name: str, bags: Bags, vocabulary: int) -> tuple[Any, float]:
    """The program, and the bytes that it reserves: arguments, results that are no argument's place,
    temporary arrays.
    """
    way, function, donate = PROGRAMS[name]
    kinds = [
        ((vocabulary, WIDTH), np.float32),
        ((ROWS, WIDTH), np.float32),
        *shapes(way, bags, vocabulary),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]
    program = jax.jit(function, donate_argnums=0 if donate else ()).lower(*arguments).compile()
    use = program.memory_analysis()
    size = (
        use.argument_size_in_bytes
        + use.output_size_in_bytes
        + use.temp_size_in_bytes
        - use.alias_size_in_bytes
    )
    return program, float(size)


def first_table(vocabulary: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((vocabulary, WIDTH), np.float32))


def first_target() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).standard_normal((ROWS, WIDTH), np.float32))


class Timed:
    """A compiled program with its arguments; a step's table is handed on, for the old one is given
    away.
    """

    def __init__(self, name: str, bags: Bags, vocabulary: int, table: jax.Array):
        way, _, self.donates = PROGRAMS[name]
        self.program, self.bytes = compiled(name, bags, vocabulary)
        self.fits = self.bytes <= LIMIT
        self.seconds: list[float] = []
        if self.fits:
            self.table = jnp.copy(table) if self.donates else table
            self.rest = [first_target(), *(jnp.asarray(z) for z in rows_of(way, bags, vocabulary))]

    def __call__(self) -> None:
        start = time.perf_counter()
        result = jax.block_until_ready(self.program(self.table, *self.rest))
        self.seconds.append(time.perf_counter() - start)
        if self.donates:
            self.table = result[1]


def measure(
    vocabulary: int, seed: int, rounds: int = ROUNDS, peaks: bool = True
) -> dict[str, dict[str, Any]]:
    """{program: {"ms", "MB", "peak MB"}}; "ms" is None for what does not fit, "peak MB" also
    without `peaks`, which take a process each.
    """
    bags, table = draw_bags(vocabulary, seed), first_table(vocabulary)
    timed = {name: Timed(name, bags, vocabulary, table) for name in PROGRAMS}
    running = [one for one in timed.values() if one.fits]
    for _ in range(rounds + 2):
        for one in running:
            one()
    return {
        name: {
            "ms": 1000 * statistics.median(one.seconds[2:]) if one.fits else None,
            "MB": one.bytes / 1e6,
            "peak MB": peak(name, vocabulary) if one.fits and peaks else None,
        }
        for name, one in timed.items()
    }


def peak(name: str, vocabulary: int) -> float:
    """How far the resident memory of a process rises above that of one with the table alone, in a
    process of its own.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.sparse_inputs",
        "--peak",
        name,
        "--vocabulary",
        str(vocabulary),
    ]
    done = subprocess.run(command, cwd=writing.ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"the process that measures {name} at vocabulary {vocabulary:,} ended with code "
            f"{done.returncode}: {last}"
        )
    return float(done.stdout.split()[-1])


def resident() -> float:
    """The most MB of memory that this program has held so far.

    (getrusage's ru_maxrss also knows the process that started it.)
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def print_peak(name: str, vocabulary: int) -> None:
    bags = draw_bags(vocabulary, 0)
    jax.block_until_ready(jnp.ones(3) + 1)
    before = resident()
    one = Timed(name, bags, vocabulary, first_table(vocabulary))
    one()
    one()
    print(f"{resident() - before:.1f}")


SIZE = (13, 5.0)  # of the plot, in inches


def measure_all(out: Path) -> Figures:
    """Whatever is not in `out` yet is measured; then all of it."""
    for vocabulary, seed in itertools.product(VOCABULARIES, SEEDS):
        path = out / f"{vocabulary}_{seed}.json"
        if not path.exists():
            print(f"--- vocabulary {vocabulary:,}, seed {seed}", flush=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(measure(vocabulary, seed), indent=1))
            part.replace(path)
    return {
        str(v): [json.loads((out / f"{v}_{seed}.json").read_text()) for seed in SEEDS]
        for v in VOCABULARIES
    }


def values(figures: Figures, vocabulary: str, name: str, key: str) -> list[float]:
    """Of every seed; none for what did not fit."""
    return [found[name][key] for found in figures[vocabulary] if found[name]["ms"] is not None]


def rows(figures: Figures, key: str, digits: int) -> dict[str, dict[str, str]]:
    """{program: {vocabulary: "median (lowest to highest)"}}"""

    def text(found: list[float]) -> str:
        if not found:
            return "more than 2 GB"
        middle, low, high = (
            f"{x:,.{digits}f}" for x in (statistics.median(found), min(found), max(found))
        )
        return middle if low == high else f"{middle} ({low} to {high})"

    return {
        name: {f"{int(v):,}": text(values(figures, v, name, key)) for v in figures}
        for name in PROGRAMS
    }


def draw(figures: Figures) -> Any:
    """Time and memory against the vocabulary; bars from the lowest to the highest seed."""

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, 2)
        axes[0].set(xlabel="vocabulary", ylabel="milliseconds (median, lowest and highest seed)")
        axes[1].set(xlabel="vocabulary", ylabel="MB that the program reserves")
        for ax, key in zip(axes, ("ms", "MB"), strict=True):
            plots.lines(ax, [line(figures, name, key) for name in PROGRAMS])
            for axis in (ax.xaxis, ax.yaxis):
                plots.plain_ticks(axis)
            ax.set_xticks([int(v) for v in figures if math.log10(int(v)) % 1 == 0])
        axes[1].axhline(LIMIT / 1e6, color="black", linewidth=0.8, linestyle=":")

    return paint


def line(figures: Figures, name: str, key: str) -> plots.Line:
    found = {int(v): values(figures, v, name, key) for v in figures}
    found = {size: seeds for size, seeds in found.items() if seeds}
    style = {
        "linestyle": "--" if name.startswith("step") else "-",
        "color": f"C{list(PROGRAMS).index(name)}",
    }
    seeds = found.values()
    middle, low, high = ([f(z) for z in seeds] for f in (statistics.median, min, max))
    return plots.Line(name, list(found), middle, low, high, style)


def report(figures: Figures) -> None:
    about = (
        f"{ROWS} rows of about {ITEMS} items (Zipf), a table of width {WIDTH} in float32, on two "
        "shared CPU cores. `gradient`: forward and "
        f"the table's gradient; `step`: these and the update by SGD, in place. Medians of {ROUNDS} "
        "rounds in turn, then of "
        f"{len(SEEDS)} seeds (lowest to highest)."
    )
    parts = [
        about,
        "Milliseconds:",
        writing.table(rows(figures, "ms", 2), "program"),
        "MB that the compiled program reserves (arguments, results, temporary):",
        writing.table(rows(figures, "MB", 1), "program"),
        "MB that the resident memory of a fresh process rises by, at its peak, with making the "
        "arguments:",
        writing.table(rows(figures, "peak MB", 0), "program"),
        "![time and memory against the vocabulary](plot.png)",
    ]
    folder = writing.ROOT / "experiments/results/sparse_inputs"
    writing.write(folder, "What do sparse inputs cost?", parts, figures, draw(figures), SIZE)


def work(argv: list[str]) -> None:
    parser = Flags(__doc__)
    parser.add_argument(
        "--peak", choices=list(PROGRAMS), help="print the peak memory of one program and end"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=VOCABULARIES[0], help="of --peak (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sparse_inputs"), help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    if args.vocabulary < 1:
        raise UserError(f"--vocabulary {args.vocabulary} must be at least 1")
    if args.peak:
        print_peak(args.peak, args.vocabulary)
    elif args.smoke:
        print(json.dumps(measure(VOCABULARIES[0], SEEDS[0], rounds=1, peaks=False), indent=1))
    else:
        report(measure_all(made(args)))


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
