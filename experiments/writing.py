"""What experiments write: tables, figures and a plot; and how they compile."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.runtime import shell
from moe_jax.terminal.table import Table, names, numbers

ROOT = Path(__file__).parent.parent
VERDICT = "## Verdict"


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
