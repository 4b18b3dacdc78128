"""What a bench has measured: as tables, as JSON, and against an earlier one."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax import version
from moe_jax.bench.contract import Timing
from moe_jax.errors import UserError
from moe_jax.terminal.table import Table, names, numbers

GIGA = 1e9


class Row(NamedTuple):
    """Holds one row of a part of the bench."""

    name: str
    timing: Timing
    # That of the rival; None = it has none, or was not asked for.
    rival: Timing | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.timing.seconds)


def ratio(one: Timing, other: Timing) -> float:
    """Returns the time of one over that of another, the median of their rounds.

    Round by round, so that a machine that slows down does not change it.
    """
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


def peak(timing: Timing) -> float:
    """Returns the FLOP/s of a product of matrices, the median of its rounds."""
    return timing.facts["flops"] / statistics.median(timing.seconds)


def peaks(products: Mapping[str, Timing]) -> Table:
    """Returns the speed of matrix products by each library and dtype, in the same rounds."""
    table = Table([*names("matrix product"), *numbers("GFLOP/s", "fastest")], title="Peak")
    for name, timing in products.items():
        fastest = timing.facts["flops"] / min(timing.seconds)
        table.add(name, f"{peak(timing) / GIGA:.0f}", f"{fastest / GIGA:.0f}")
    return table


def training(rows: Sequence[Row], products: Mapping[str, Timing]) -> Table:
    """Returns the steps of each variant against the first, the peak, and the rival.

    `products`: our matrix products, by the dtype of the variants.
    """
    columns = numbers(
        "ms a step",
        "fastest",
        "tokens/s",
        "time / first",
        "% of peak",
        "active",
        "total",
        "memory",
        "ms more if logged",
    )
    rivals = any(row.rival for row in rows)
    if rivals:
        columns += numbers("theirs tokens/s", "ours / theirs", "loss ours", "loss theirs")
    table = Table([*names("training step"), *columns], title="Training")
    for row in rows:
        facts = row.timing.facts
        # FLOP/s of the step over those of the product: how near it comes to the peak.
        share = facts["flops"] / row.seconds / peak(products[facts["dtype"]])
        cells = [
            row.name,
            f"{1000 * row.seconds:.0f}",
            f"{1000 * min(row.timing.seconds):.0f}",
            f"{facts['tokens'] / row.seconds:.0f}",
            f"{ratio(row.timing, rows[0].timing):.2f}",
            f"{100 * share:.0f}",
            f"{facts['active'] / 1e6:.2f} M",
            f"{facts['total'] / 1e6:.2f} M",
            f"{row.timing.memory / GIGA:.2f} GB",
            f"{1000 * facts['logged']:.0f}",
        ]
        if row.rival:
            theirs = statistics.median(row.rival.seconds)
            cells += [
                f"{row.rival.facts['tokens'] / theirs:.0f}",
                # Time of theirs over ours, which is speed of ours over theirs.
                f"{ratio(row.rival, row.timing):.2f}",
                f"{facts['loss']:.3f}",
                f"{row.rival.facts['loss']:.3f}",
            ]
        table.add(*cells)
    return table


def decoding(rows: Sequence[Row], title: str) -> Table:
    """Returns tokens per second of each row, and the rival's."""
    columns = numbers("ms", "fastest", "tokens/s")
    if any(row.rival for row in rows):
        columns += numbers("theirs tokens/s", "ours / theirs")
    table = Table([*names("decoding"), *columns], title=title)
    for row in rows:
        tokens = row.timing.facts["tokens"]
        cells = [
            row.name,
            f"{1000 * row.seconds:.0f}",
            f"{1000 * min(row.timing.seconds):.0f}",
            f"{tokens / row.seconds:.0f}",
        ]
        if row.rival:
            theirs = statistics.median(row.rival.seconds)
            cells += [f"{tokens / theirs:.0f}", f"{ratio(row.rival, row.timing):.2f}"]
        table.add(*cells)
    return table


def layers(timings: Mapping[str, Timing], variants: Sequence[str]) -> Table:
    """Returns the time of the layer where all tokens choose the same experts, over balanced."""
    table = Table(
        [*names("the MoE layer alone"), *numbers("balanced ms", "collapsed ms", "ratio")],
        title="Every token on the same experts (forward and backward)",
    )
    for name in variants:
        balanced, collapsed = timings[f"{name}, balanced"], timings[f"{name}, collapsed"]
        medians = [statistics.median(timing.seconds) for timing in (balanced, collapsed)]
        cells = [f"{1000 * median:.1f}" for median in medians]
        table.add(name, *cells, f"{ratio(collapsed, balanced):.2f}")
    return table


def start(seconds: Mapping[str, float], name: str) -> Table:
    """Returns the seconds of each part of a start; `name`: of the variant whose step it is."""
    table = Table(
        [*names("start"), *numbers("seconds")],
        title=f"Start (fresh processes, the smallest of some; the step is that of {name})",
    )
    for name, value in seconds.items():
        table.add(name, f"{value:.2f}")
    return table


def scaling(size: str, timings: Mapping[int, tuple[Timing, Timing]], name: str) -> Table:
    """Returns the time of a step for each size, and over that of the variant as it is.

    `timings`: of each size, and of the variant in the same rounds.
    """
    columns = numbers("ms a step", "tokens/s", f"time / {name}", "memory")
    table = Table([*numbers(size), *columns], title=f"A training step against {size}")
    for n, (timing, base) in timings.items():
        seconds = statistics.median(timing.seconds)
        table.add(
            str(n),
            f"{1000 * seconds:.0f}",
            f"{timing.facts['tokens'] / seconds:.0f}",
            f"{ratio(timing, base):.2f}",
            f"{timing.memory / GIGA:.2f} GB",
        )
    return table


def depth(seconds: Mapping[int, float], num_blocks: Mapping[int, int], name: str) -> Table:
    """Returns the seconds to trace and compile a step of each depth."""
    table = Table(
        [*numbers("blocks", "seconds", "of the first")],
        title=f"Tracing and compiling a step of {name} with model.scan = True",
    )
    first = next(iter(seconds.values()))
    for n, value in seconds.items():
        table.add(str(num_blocks[n]), f"{value:.1f}", f"{value / first:.2f}")
    return table


def overheads(timings: Mapping[str, Timing], steps: int, name: str) -> Table:
    """Returns what runs of some steps spend beside them. The first row has nothing switched on."""
    table = Table(
        [*names("run"), *numbers("seconds beside its steps", "more than the first", "of the run")],
        title=f"{steps} steps of {name} with one thing switched on",
    )
    first = next(iter(timings.values()))
    whole = first.facts["waited"] + first.facts["stepped"]
    for row, timing in timings.items():
        seconds = statistics.median(timing.seconds)
        pairs = zip(timing.seconds, first.seconds, strict=True)
        more = statistics.median(own - of_first for own, of_first in pairs)
        table.add(row, f"{seconds:.2f}", f"{more:.2f}", f"{more / whole:.1%}")
    waited = first.facts["waited"]
    table.add("of the first, waiting for data", f"{waited:.2f}", "", f"{waited / whole:.1%}")
    return table


def machine() -> dict[str, Any]:
    """Returns what is known of the machine and the versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        # One line for each core; other architectures have none of that name.
        processor = (models or [processor])[0]
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        **version.made_by(),
    }


def plain(value: Any) -> Any:
    """Returns results as JSON has them: every second of every round."""
    # A NamedTuple, whose names JSON would lose.
    if hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def read(path: Path) -> dict[str, Any]:
    """Returns results that `as_json` wrote. Raises UserError for any other file."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--against {path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--against {path} cannot be read: {error}") from None
    if not isinstance(parts, dict) or "machine" not in parts:
        raise UserError(f"--against {path}: no results of `python -m moe_jax bench --out FILE`")
    return parts


def against(now: Mapping[str, Any], before: Mapping[str, Any], name: str) -> Table:
    """Returns the medians of rows that both results have, now over before.

    The peak is a row like others: a machine that was slower then shows there.
    """
    table = Table(
        [*names("row"), *numbers("before", "now", "time, now / before")], title=f"Against {name}"
    )
    # Only what both have is compared: a bench may have been of other variants.
    old = _medians(before)
    for row, seconds in _medians(now).items():
        if row in old:
            cells = (f"{1000 * old[row]:.1f} ms", f"{1000 * seconds:.1f} ms")
            table.add(row, *cells, f"{seconds / old[row]:.2f}")
    return table


def _medians(parts: Mapping[str, Any]) -> dict[str, float]:
    """Returns the median seconds of every row of results that are JSON."""
    medians: dict[str, float] = {}
    for name, timing in parts.get("peak", {}).items():
        medians[f"matrix product, {name}"] = statistics.median(timing["seconds"])
    for part in ("training", "decoding"):
        for row in parts.get(part, []):
            seconds = row["timing"]["seconds"]
            medians[f"{part}, {row['name']}"] = statistics.median(seconds)
    for name, timing in parts.get("layer", {}).items():
        medians[f"layer, {name}"] = statistics.median(timing["seconds"])
    for name, timing in parts.get("overheads", {}).items():
        medians[f"run, {name}"] = statistics.median(timing["seconds"])
    for curve in parts.get("scaling", []):
        for n, (timing, _) in curve["timings"].items():
            medians[f"{n} {curve['size']}"] = statistics.median(timing["seconds"])
    for n, seconds in parts.get("depth", {}).items():
        medians[f"compile {n} repeats"] = seconds
    # A start has one number already, the smallest of some.
    medians |= {f"start, {name}": seconds for name, seconds in parts.get("start", {}).items()}
    return medians
