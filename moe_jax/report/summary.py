"""What the end of a run tells: held-out figures beside their rivals, parameters, speed, where the
files are, what to do next.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_jax.data.contract import Data
from moe_jax.models.decodable import why_not_decoded
from moe_jax.plan import flops
from moe_jax.runtime import shell
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS
from moe_jax.terminal.progress import Progress, duration, readable


class Result(NamedTuple):
    """Holds how a run ended.

    `step` of `cfg.train.steps`, the signal that ended it (0: none), and the last evaluation.
    """

    step: int
    signal: int
    evaluation: dict[str, Any]
    data: Data
    tokens_per_second: float
    sample: str


def show(cfg: Config, workdir: Path, result: Result, seconds: float) -> None:
    """Writes the figures to summary.json, and prints them as tables."""
    task, console = TASKS[cfg.task], Console()
    with Progress(active=True, console=console).doing("computing what the model is compared with"):
        rows = task.comparison(cfg, result.data, result.evaluation)
    written = {"step": result.step, "title": task.title, "rows": rows, "seconds": seconds}
    written["tokens_per_second"] = result.tokens_per_second
    (workdir / "summary.json").write_text(json.dumps(written, indent=1) + "\n")
    if result.sample:
        console.rule("sample", align="left")
        console.print(result.sample, highlight=False, markup=False, soft_wrap=True)
    console.print(
        task.title, highlight=False, markup=False, soft_wrap=True
    )  # a title of the table would wrap with it
    console.print(figures_table(rows))
    # Not a table: a command must not wrap.
    for name, value in {**words(rows), **facts(cfg, workdir, result, seconds)}.items():
        console.print(f"{name:12}  {value}", highlight=False, markup=False, soft_wrap=True)


def facts(cfg: Config, workdir: Path, result: Result, seconds: float) -> dict[str, str]:
    """Size, speed, where the files are, and commands that work as they are printed."""
    counts = flops.parameters(cfg.model)
    found = {
        "steps": f"{result.step} of {cfg.train.steps}",
        "parameters": f"{readable(counts.total)} in all, {readable(counts.active)} active per "
        "token",
        "tokens/s": readable(result.tokens_per_second) if result.tokens_per_second else "-",
        "time": duration(seconds),
        "metrics": f"{workdir / 'metrics.jsonl'}",
        "checkpoints": f"{workdir / 'checkpoints'}",
        "curves": curves(workdir),
    }
    there = {
        name: workdir / file
        for name, file in (("routing", "routing.png"), ("predictions", "predictions.jsonl"))
    }
    found |= {name: str(path) for name, path in there.items() if path.exists()}
    if TASKS[cfg.task].is_language and not why_not_decoded(cfg.model):
        found["next"] = shell.command(
            "moe_jax", "generate", "--workdir", workdir, "--prompt", "In the beginning"
        )
    return found


def curves(workdir: Path) -> str:
    """Returns the command that shows the curves of a run, and what to install for it first."""
    command = shell.command("tensorboard.main", "--logdir", workdir)
    if importlib.util.find_spec("tensorboard") is None:
        command += "  # after pip install tensorboard"
    return command


def words(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Returns what rows have beside numbers, such as the signature of a BLEU, which is too long for
    a cell: once where all have the same.
    """
    found: dict[str, str] = {}
    for column in next(iter(rows.values())):
        texts = {
            name: str(row[column])
            for name, row in rows.items()
            if not isinstance(row[column], int | float)
        }
        same = len(set(texts.values())) == 1
        found |= (
            {column: next(iter(texts.values()))}
            if same
            else {f"{column}, {n}": text for n, text in texts.items()}
        )
    return found


def figures_table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line per row; the last one, of all of them, apart.

    Numbers with three digits after the point.
    """
    table = Table()
    table.add_column("", overflow="fold")
    first = next(iter(rows.values()))
    columns = [name for name, value in first.items() if isinstance(value, int | float)]
    for name in columns:
        table.add_column(Text(name), justify="right", overflow="fold")
    for i, (name, row) in enumerate(rows.items()):
        # As Text: names come from files, and what looks like markup in them is none.
        cells = [
            Text(f"{row[column]:.3f}" if isinstance(row[column], float) else str(row[column]))
            for column in columns
        ]
        table.add_row(Text(name), *cells, end_section=i == len(rows) - 2)
    return table
