"""What the end of a run tells: held-out bits per byte beside gzip and xz, parameters, speed, where the files are, what to do next."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_jax import flops
from moe_jax.config import Config
from moe_jax.data.baselines import compression_table
from moe_jax.models.decoder import why_not_decoded
from moe_jax.progress import duration, readable
from moe_jax.train import Result

MOST_BYTES = 4_000_000  # of a domain's text that the compressors read


def show(cfg: Config, workdir: Path, result: Result, seconds: float) -> None:
    """Prints the tables, and writes the same figures to summary.json."""
    console = Console()
    if result.sample:
        console.rule("sample", align="left")
        console.print(result.sample, highlight=False, markup=False, soft_wrap=True)
    rivals = compression_table(result.dataset, MOST_BYTES)
    domains = {name: result.evaluation.get(f"domain/{name}/bits_per_byte") for name in result.dataset.domains}
    rows = {name: {"model": bits, **rivals[name]} for name, bits in domains.items() if bits is not None}
    rows["mean"] = {key: sum(row[key] for row in rows.values()) / len(rows) for key in next(iter(rows.values()))}
    console.print(bits_table(rows))
    counts = flops.parameters(cfg.model)
    facts = {
        "steps": f"{result.step} of {cfg.train.steps}",
        "parameters": f"{readable(counts.total)} in all, {readable(counts.active)} active per token",
        "tokens/s": readable(result.tokens_per_second) if result.tokens_per_second else "-",
        "time": duration(seconds),
        "metrics": f"{workdir / 'metrics.jsonl'}",
        "checkpoints": f"{workdir / 'checkpoints'}",
        "routing": f"{workdir / 'routing.png'}",
        "curves": f"tensorboard --logdir {workdir}",
    }
    if not why_not_decoded(cfg.model):
        facts["next"] = f'python -m moe_jax generate --workdir {workdir} --prompt "In the beginning"'
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table, soft_wrap=True)
    result_file = {
        "step": result.step,
        "bits_per_byte": rows,
        "seconds": seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    (workdir / "summary.json").write_text(json.dumps(result_file, indent=1) + "\n")


def bits_table(rows: dict[str, dict[str, float]]) -> Table:
    """One line per domain: held-out bits per byte of the model and of the compressors, lower is better."""
    table = Table(title="held-out bits per byte (lower is better)", title_justify="left")
    table.add_column("domain")
    for name in ("model", "gzip -9", "xz -9"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in ("model", "gzip", "xz")), end_section=name == list(rows)[-2])
    return table
