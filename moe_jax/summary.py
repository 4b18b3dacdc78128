"""What the end of a run tells: held-out figures beside their rivals, parameters, speed, where the files are, what to do next."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax import flops
from moe_jax.config import Config
from moe_jax.models.decoder import why_not_decoded
from moe_jax.progress import duration, readable
from moe_jax.tasks import TASKS
from moe_jax.train import Result


def show(cfg: Config, workdir: Path, result: Result, seconds: float) -> None:
    """Prints the tables, and writes the same figures to summary.json."""
    console = Console()
    if result.sample:
        console.rule("sample", align="left")
        console.print(result.sample, highlight=False, markup=False, soft_wrap=True)
    rows = TASKS[cfg.task].table(cfg, result.data, result.evaluation)
    console.print(figures_table(TASKS[cfg.task].title, rows))
    counts = flops.parameters(cfg.model)
    facts = {
        "steps": f"{result.step} of {cfg.train.steps}",
        "parameters": f"{readable(counts.total)} in all, {readable(counts.active)} active per token",
        "tokens/s": readable(result.tokens_per_second) if result.tokens_per_second else "-",
        "time": duration(seconds),
        "metrics": f"{workdir / 'metrics.jsonl'}",
        "checkpoints": f"{workdir / 'checkpoints'}",
        "curves": f"tensorboard --logdir {workdir}",
    }
    there = {name: workdir / file for name, file in (("routing", "routing.png"), ("predictions", "predictions.jsonl"))}
    facts |= {name: str(path) for name, path in there.items() if path.exists()}
    if cfg.task == "lm" and not why_not_decoded(cfg.model):
        facts["next"] = f'python -m moe_jax generate --workdir {workdir} --prompt "In the beginning"'
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table, soft_wrap=True)
    result_file = {
        "step": result.step,
        "title": TASKS[cfg.task].title,
        "rows": rows,
        "seconds": seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    (workdir / "summary.json").write_text(json.dumps(result_file, indent=1) + "\n")


def figures_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """One line per row; the last one, of all of them, apart. Numbers with three digits after the point."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in next(iter(rows.values())):
        table.add_column(name, justify="right")
    text = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    for i, (name, row) in enumerate(rows.items()):
        table.add_row(name, *map(text, row.values()), end_section=i == len(rows) - 2)
    return table
