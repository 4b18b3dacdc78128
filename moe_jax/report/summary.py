"""What the end of a run tells: held-out figures beside their rivals, parameters, speed, where the
files are, what to do next.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.data.contract import Data
from moe_jax.models.decodable import why_not_decoded
from moe_jax.plan import flops
from moe_jax.report import trackers
from moe_jax.runtime import shell
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS
from moe_jax.terminal.progress import Progress
from moe_jax.terminal.table import Table, names, numbers
from moe_jax.terminal.units import duration, readable


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
    # In words, over all starts of the run.
    goodput: str = ""


def show(cfg: Config, workdir: Path, result: Result, seconds: float) -> None:
    """Writes the figures to summary.json, and prints them for a person to read."""
    task, console = TASKS[cfg.task], shell.console()
    with Progress(active=True, console=console).doing("computing what the model is compared with"):
        rows = task.comparison(cfg, result.data, result.evaluation)
    summary = {
        "step": result.step,
        "title": task.title,
        "rows": rows,
        "seconds": seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    # Written first: whatever goes wrong with the terminal, the figures are on disk.
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if result.sample:
        console.rule("sample", align="left")
        console.print(result.sample, highlight=False, markup=False, soft_wrap=True)
    console.print(figures_table(task.title, rows), "")
    # Not a table: a command must not wrap.
    for name, value in {**words(rows), **facts(cfg, workdir, result, seconds)}.items():
        console.print(f"{name:12}  {value}", highlight=False, markup=False, soft_wrap=True)


def facts(cfg: Config, workdir: Path, result: Result, seconds: float) -> dict[str, str]:
    """Returns size, speed, where the files are, and commands that work as they are printed."""
    counts = flops.parameters(cfg.model)
    total, active = readable(counts.total), readable(counts.active)
    lines = {
        "steps": f"{result.step} of {cfg.train.steps}",
        "parameters": f"{total} in all, {active} active per token",
        "tokens/s": readable(result.tokens_per_second) if result.tokens_per_second else "-",
        "time": duration(seconds),
        "goodput": result.goodput,
        "metrics": str(workdir / "metrics.jsonl"),
        "checkpoints": str(workdir / "checkpoints"),
        "curves": curves(workdir),
    }
    lines |= tracked(workdir)
    # Not every task writes these.
    for name, file in (("routing", "routing.png"), ("predictions", "predictions.jsonl")):
        if (workdir / file).exists():
            lines[name] = str(workdir / file)
    if TASKS[cfg.task].is_language and not why_not_decoded(cfg.model):
        prompt = ("--prompt", "In the beginning")
        lines["next"] = shell.command("moe_jax", "generate", "--workdir", workdir, *prompt)
    return lines


def tracked(workdir: Path) -> dict[str, str]:
    """Returns where the trackers of the run have it."""
    try:
        known = json.loads((workdir / trackers.FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: run["where"] for name, run in known.items()}


def curves(workdir: Path) -> str:
    """Returns the command that shows the curves of a run, and what to install for it first."""
    command = shell.command("tensorboard.main", "--logdir", workdir)
    # Events are written by tensorboardX; what shows them is a package of its own.
    if importlib.util.find_spec("tensorboard") is None:
        command += "  # after pip install tensorboard"
    return command


def words(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Returns what rows have beside numbers, such as the signature of a BLEU, which is too long for
    a cell: once where all have the same.
    """
    lines: dict[str, str] = {}
    for column in next(iter(rows.values())):
        texts = {
            name: str(row[column]) for name, row in rows.items() if not _is_number(row[column])
        }
        if len(set(texts.values())) == 1:
            lines[column] = next(iter(texts.values()))
        else:
            lines |= {f"{column}, {name}": text for name, text in texts.items()}
    return lines


def figures_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Returns a table of what is a number in the rows. The last one, which is of all of them,
    stands apart.
    """
    first_row = next(iter(rows.values()))
    # All rows have the same columns.
    columns = [name for name, value in first_row.items() if _is_number(value)]
    table = Table([*names(""), *numbers(*columns)], title=title)
    *_, last = rows
    for name, row in rows.items():
        if name == last:
            table.section()
        table.add(name, *(_cell(row[column]) for column in columns))
    return table


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _cell(number: float) -> str:
    """Returns a number for the table; whole numbers as they are."""
    return f"{number:.3f}" if isinstance(number, float) else str(number)
