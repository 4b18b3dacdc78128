"""Trains a grid of cells (changed keys) x seeds, and compares the cells run by run: what every
experiment of this folder stands on.

    python -m experiments.run --config configs/quickstart.py --out runs/width --cell wide: \
        --cell "narrow: --config.model.moe.expert_hidden=64"

A cell is a name and its changed keys; the first is the reference. Keys that are changed outside of
a cell are changed in all. The seeds are 0, 1 and 2, or
those that are named (`--seeds 0 5` are two seeds), or the first so many (`--num_seeds 5`).
`--smoke` trains a few steps of every cell, to see that all of them work. Every run has its own
directory OUT/CELL/seed_N, is not run again once it is finished, and goes on from its checkpoint
when it was interrupted. Runs of one seed see the same data in the same order, so cells are compared
by the differences of such pairs: much of what a seed does to a run is in both.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

import jax
from scipy import stats

from experiments.command_line import Flags, Interrupted, add_seeds, launch, made, seeds, seeds_told
from moe_jax import checkpoint, config, train
from moe_jax.config import command_line as config_flags
from moe_jax.config import config_file, smoke
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.plan import flops
from moe_jax.report.metrics import read_rows
from moe_jax.runtime import shell
from moe_jax.terminal.table import Table, names, numbers

ROOT = Path(__file__).parent.parent
CONFIDENCE = 0.95
# What is the same in every run of a grid: one device, one evaluation at the end, a checkpoint to go
# on from.
PLAIN = {
    "mesh.data": 1,
    "eval.every": 0,
    "eval.sample_tokens": 0,
    "checkpoint.every": 100,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "log.tensorboard": False,
}
VERDICT = "## Verdict"
Changes = Mapping[str, Any]  # dotted keys of a config and their values
Figures = dict[str, Any]
Results = dict[str, dict[int, Figures]]  # by cell, by seed


class Grid(NamedTuple):
    config: Path
    base: Changes  # of every cell, beside PLAIN
    cells: Mapping[str, Changes]
    seeds: Sequence[int]
    smoke: bool = False  # a few steps of each cell, with the first seed alone


class Interval(NamedTuple):
    """A mean and its confidence interval; `half` is infinite for one value alone."""

    mean: float
    half: float
    number: int

    @property
    def decided(self) -> bool:
        """Zero is not in it."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


# Runs


def read_config(grid: Grid, cell: str, seed: int) -> dict[str, Any]:
    """The config of one run as a nested dict of JSON values.

    UserError, by the cell, for keys that do not exist or do nothing.
    """
    changes = {**PLAIN, **grid.base, **grid.cells[cell], "seed": seed}
    raw = config_file.read(grid.config, changes, f"cell {cell}: ")
    return smoke.shorten(raw)[0] if grid.smoke else raw


def run_all(grid: Grid, out: Path) -> Results:
    """Trains whatever is not finished, all cells of the first seed before those of the next, and
    returns the figures of all.
    """
    defaults = config_file.default_values()
    raws = {
        (seed, cell): read_config(grid, cell, seed)
        for seed in seeds_of(grid)
        for cell in grid.cells
    }
    for (_, cell), raw in raws.items():
        checked(raw, cell)  # all of them before the first is trained
    print(
        f"{count(len(grid.cells), 'cell')}, {seeds_told(tuple(seeds_of(grid)))}: "
        f"{count(len(raws), 'run')} in {out}",
        flush=True,
    )
    for seed in seeds_of(grid):
        for cell in grid.cells:
            raw = raws[seed, cell]
            if finished(raw, defaults, place(out, cell, seed)) is None:
                print(f"--- {cell}, seed {seed}", flush=True)
                run_one(raw, place(out, cell, seed))
    return collect(grid, out)


def run_and_report(grid: Grid, out: Path, report: Callable[[Path], None]) -> None:
    """Trains what is not finished and writes the report; of a smoke run it shows the comparison
    alone.
    """
    compile_quickly(out / "compiled")
    results = run_all(grid, out)
    if grid.smoke:
        show(compare(results, "bits_per_byte"))
    else:
        report(out)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def seeds_of(grid: Grid) -> Sequence[int]:
    return grid.seeds[:1] if grid.smoke else grid.seeds


def checked(raw: Mapping[str, Any], cell: str) -> config.Config:
    """The built config of a cell. UserError, by the cell, for what the rules refuse."""
    try:
        return config.build(raw, 1)
    except UserError as error:
        raise UserError(f"cell {cell}: {error}") from None


def collect(grid: Grid, out: Path) -> Results:
    """The figures of the finished runs; cells without any are left out."""
    results: Results = {}
    defaults = config_file.default_values()
    for cell in grid.cells:
        for seed in seeds_of(grid):
            figures = finished(read_config(grid, cell, seed), defaults, place(out, cell, seed))
            if figures is not None:
                results.setdefault(cell, {})[seed] = figures
    return results


def collected(grids: Sequence[Grid], out: Path) -> Results:
    """The figures of the finished runs of several grids. UserError where there is none at all."""
    results = {cell: runs for grid in grids for cell, runs in collect(grid, out).items()}
    if not results:
        raise UserError(
            f"--out {out} has no finished run of this experiment: train first, without --report"
        )
    return results


def place(out: Path, cell: str, seed: int) -> Path:
    return out / cell / f"seed_{seed}"


def finished(raw: Mapping[str, Any], defaults: Mapping[str, Any], workdir: Path) -> Figures | None:
    """The figures that a run left, None when it has not ended.

    UserError when they are those of another config.

    `defaults` stands for the keys that have come into it since.
    """
    path = workdir / "result.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a full disk empties files: the run is there, and makes its figures again
        return None
    old, _ = checkpoint.fill(found["config"], defaults, config.RESUME_MAY_CHANGE)
    if config.build(old, 1) != config.build(
        raw, 1
    ):  # options of what is not chosen may differ: they do nothing
        different = (
            key
            for key in sorted(flat(old).keys() | flat(raw).keys())
            if flat(old).get(key) != flat(raw).get(key)
        )
        raise UserError(
            f"{path} is the result of another config (another {', '.join(different)}): give "
            f"another --out, or remove {workdir}"
        )
    return found["figures"]


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A nested config by dotted keys."""
    parts = [
        flat(v, f"{path}{k}.") if isinstance(v, Mapping) else {path + k: v} for k, v in tree.items()
    ]
    return {key: value for part in parts for key, value in part.items()}


def run_one(raw: Mapping[str, Any], workdir: Path) -> Figures:
    """One run in this process, from its checkpoint if it has one; result.json is written last."""
    cfg = config.build(raw, 1)
    began = time.monotonic()
    one = mesh.make(mesh.ONE, jax.devices()[:1])
    with jax.set_mesh(one):
        result = train.run(cfg, raw, workdir, began)
    if result.signal:
        raise Interrupted(
            result.signal, f"saved step {result.step} of {cfg.train.steps} in {workdir}"
        )
    figures = figures_of(cfg, result.evaluation, workdir) | {"seconds": time.monotonic() - began}
    part = workdir / "result.part"
    part.write_text(json.dumps({"config": raw, "figures": figures}, indent=1) + "\n")
    part.replace(workdir / "result.json")
    return figures


def figures_of(cfg: config.Config, evaluation: Mapping[str, Any], workdir: Path) -> Figures:
    """What a run is compared by.

    Of the experts' density, the fraction of their weights that is not zero: that at the end, and
    the curve [(step, density)].
    """
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row]
    curve = [(row["step"], row.get("train/expert_density", 1.0)) for row in rows]
    counts = flops.parameters(cfg.model)
    scalars = {name: value for name, value in evaluation.items() if isinstance(value, float | int)}
    return {
        **scalars,
        "train loss": statistics.mean(row["train/loss"] for row in rows[-5:]),
        "steps": cfg.train.steps,
        "tokens": cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len,
        "epochs": rows[-1]["train/epoch"],
        "parameters": counts.total,
        "expert parameters": counts.experts,
        "density": curve[-1][1],
        "density curve": curve,
    }


# Statistics


def interval(values: Sequence[float]) -> Interval:
    """Mean and half width of Student's 95 % confidence interval: t(n - 1) s / sqrt(n)."""
    mean, number = statistics.mean(values), len(values)
    if number < 2:
        return Interval(mean, float("inf"), number)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1))
    return Interval(mean, t * statistics.stdev(values) / number**0.5, number)


def paired(results: Results, cell: str, reference: str, figure: str) -> Interval:
    """Of the differences cell - reference, seed by seed; the seeds that both have."""
    a, b = results[cell], results[reference]
    return interval([a[seed][figure] - b[seed][figure] for seed in sorted(a.keys() & b.keys())])


def mean(results: Results, cell: str, figure: str) -> float:
    return statistics.mean(run[figure] for run in results[cell].values())


# What is written


def table(rows: Mapping[str, Mapping[str, Any]], first: str) -> Table:
    """One line for every row, its name in the column `first`."""
    columns = list(next(iter(rows.values())))
    made = Table([*names(first), *numbers(*columns)])
    for name, row in rows.items():
        made.add(name, *(str(row[column]) for column in columns))
    return made


def show(*parts: str | Table) -> None:
    """Prints sentences and tables: a terminal gets tables that fit it, a file or pipe Markdown."""
    for part in parts:
        if isinstance(part, str):
            shell.tell(part)
        elif sys.stdout.isatty():
            shell.console().print(part)
        else:
            print(part.markdown(), flush=True)
        print()


def write(
    folder: Path,
    title: str,
    parts: Sequence[str | Table],
    figures: Any,
    draw: Callable[[Any], None],
    size: tuple,
) -> None:
    """table.md, figures.json and plot.png of an experiment.

    The verdict, which people write, stays when the table is written anew.

    `draw` gets a matplotlib figure of `size` inches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "table.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    verdict = (
        old[old.index(VERDICT) :].rstrip() if VERDICT in old else f"{VERDICT}\n\nNot written yet."
    )
    texts = [part.markdown() if isinstance(part, Table) else part for part in parts]
    path.write_text("\n\n".join([f"# {title}", *texts, verdict]) + "\n", encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    plot(folder / "plot.png", draw, size)
    show(*parts, f"written: {path}, and figures.json and plot.png beside it")


def plot(path: Path, draw: Callable[[Any], None], size: tuple) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size, layout="constrained", dpi=110)
    draw(figure)
    figure.savefig(path)
    pyplot.close(figure)


def compile_quickly(folder: Path) -> None:
    """Before jax looks for devices: short runs are mostly compilation; level 1 makes steps of about
    the usual speed.

    Programs are kept in a folder, so that a run that starts again does not compile again.
    """
    os.environ.setdefault("XLA_FLAGS", as_flags(QUICK | {"xla_backend_optimization_level": 1}))
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def parse_cells(texts: Sequence[str], path: Path) -> dict[str, Changes]:
    """Returns the cells of --cell, their values typed by the config of a file.

    Raises UserError for a name that is no name of a directory, or that two cells have.
    """
    cells: dict[str, Changes] = {}
    for text in texts:
        name, words = config_flags.named(text, "--cell")
        if not name or "/" in name or name.startswith("."):
            raise UserError(
                f"--cell {text}: write 'NAME: --config.KEY=VALUE', where NAME is that of a "
                "directory"
            )
        if name in cells:
            raise UserError(f"--cell: two cells are called {name}")
        try:
            cells[name] = config_flags.changed(config_file.load(path), words)
        except UserError as error:
            raise UserError(f"cell {name}: {error}" if words else str(error)) from None
    return cells


def compare(results: Results, figure: str) -> Table:
    """The table of a grid: the mean of a figure and its paired difference to the first cell."""
    reference = next(iter(results))
    known = next(iter(results[reference].values()))
    if not isinstance(known.get(figure), int | float):
        numeric = ", ".join(name for name, value in known.items() if isinstance(value, int | float))
        raise UserError(f"--figure {figure}: the runs have no such figure, but {numeric}")
    rows = {
        cell: {
            figure: f"{mean(results, cell, figure):.4f}",
            f"minus {reference}": ""
            if cell == reference
            else str(paired(results, cell, reference, figure)),
            "seeds": len(results[cell]),
            "epochs": f"{mean(results, cell, 'epochs'):.2f}",
        }
        for cell in results
    }
    return table(rows, "cell")


def parse(argv: list[str]) -> Any:
    parser = Flags(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cell",
        action="append",
        required=True,
        help="'NAME: --config.KEY=VALUE --config.KEY=VALUE'; the first is the reference",
    )
    add_seeds(parser)
    parser.add_argument(
        "--figure",
        default="bits_per_byte",
        help="what cells are compared by (default: %(default)s)",
    )
    return config_flags.parse(parser, argv)


def work(argv: list[str]) -> None:
    args = parse(argv)
    base = config_flags.changed(config_file.load(args.config), args.changes)
    cells = parse_cells(args.cell, args.config)
    grid = Grid(args.config, base, cells, seeds(args), args.smoke)
    for cell in grid.cells:
        checked(read_config(grid, cell, 0), cell)  # a mistake, before a directory is made
    out = made(args)
    compile_quickly(out / "compiled")
    show(compare(run_all(grid, out), args.figure))


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
