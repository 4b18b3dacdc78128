"""What a study leaves: figures.json, table.md and plot.png in a folder of its name.

table.md is made of figures.json and nothing else, so that a test can tell when it is stale. What
people write below "## Notes" stays.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.study import judge, plots
from moe_jax.study.contract import Study
from moe_jax.study.judge import Interval
from moe_jax.study.ledger import Line
from moe_jax.study.progress import State
from moe_jax.terminal.table import Table, names, numbers

NOTES = "## Notes"
# Of every arm: the heading, the figure, and how it is written.
COLUMNS = (
    ("train nats", "train_loss", "{:.4f}"),
    ("held-out nats", "loss", "{:.4f}"),
    ("tokens", "tokens", "{:,.0f}"),
    ("epochs", "epochs", "{:.2f}"),
    ("active FLOPs / token", "active_flops", "{:.3g}"),
    ("training FLOPs", "train_flops", "{:.3g}"),
    ("parameters", "total_parameters", "{:,.0f}"),
    ("MB of a step", "memory", "{:.1f}"),
    ("ms / step", "step_seconds", "{:.1f}"),
)
SCALES = {"memory": 1e-6, "step_seconds": 1e3}


def write(folder: Path, study: Study, state: State) -> None:
    """Writes the three files of a study."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = collect(study, state)
    text = json.dumps(figures, indent=1)
    (folder / "figures.json").write_text(text + "\n", encoding="utf-8")
    # Read back, so that the table is made of what the file says, and of nothing else.
    figures = json.loads(text)
    path = folder / "table.md"
    path.write_text(render(figures, notes(path)), encoding="utf-8")
    plots.draw(figures, folder / "plot.png")


def collect(study: Study, state: State) -> dict[str, Any]:
    """Returns all that is known of a study, as JSON."""
    undecided = {name: arm.undecided for name, arm in state.arms.items() if arm.undecided}
    verdicts = judge.judge(study, state.runs, undecided)
    return {
        "name": study.name,
        "question": study.question,
        "paper": study.paper,
        "equal": study.equal,
        "figure": study.figure,
        "columns": list(study.columns),
        "x": dict(study.x),
        "x_label": study.x_label,
        "arms": {name: _arm(name, state) for name in study.arms},
        "verdicts": [judge.as_json(verdict) for verdict in verdicts],
        "cpu_minutes": cpu_minutes([*state.lines, *state.searched]),
        "commits": sorted({line["commit"] for line in state.lines}),
        "machines": sorted({line["machine"]["node"] for line in state.lines}),
        "data": sorted({line["data"] for line in state.lines}),
    }


def cpu_minutes(lines: Sequence[Line]) -> float:
    """Returns the processor time of runs. Lines of before it was measured count with their time.

    A run that two studies share counts in both.
    """
    # By key, because a cell counts once: the search and the seeds may share it.
    of_cell = {line["key"]: line.get("cpu_seconds", line["seconds"]) for line in lines}
    return sum(of_cell.values()) / 60


def _arm(name: str, state: State) -> dict[str, Any]:
    """Returns what figures.json has of an arm: its rate, the search of it, its run of each seed."""
    arm = state.arms[name]
    runs_of_seed = {}
    for seed, runs in state.runs.items():
        if name in runs:
            # The keys of JSON are text.
            runs_of_seed[str(seed)] = dict(runs[name])
    return {
        # JSON has no NaN, which is the rate of an arm that has none yet.
        "rate": None if math.isnan(arm.rate) else arm.rate,
        "undecided": arm.undecided,
        "tried": [[rate, value] for rate, value in sorted(arm.tried.items())],
        "runs": runs_of_seed,
    }


def notes(path: Path) -> str:
    """Returns what people wrote in a table.md, from its heading on; "" = nothing."""
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    # Without the heading, `heading` is empty, and so is what follows it.
    _, heading, after = text.partition(NOTES)
    return (heading + after).rstrip()


def render(figures: Mapping[str, Any], kept: str) -> str:
    """Returns table.md of figures.json. `kept`: the notes of people."""
    # Nine of the forty digits, and what follows them: " with changes", where files had changed.
    commits = [commit[:9] + commit[40:] for commit in figures["commits"]]
    code = ", ".join(commits) or "no run yet"
    parts = [
        f"# {figures['question']}",
        f"Paper: {figures['paper']}. Equal in all arms that are compared: {figures['equal']}.",
        f"Made by `python -m experiments.run {figures['name']}` at commit {code}, in "
        f"{figures['cpu_minutes']:.0f} minutes of one core.",
        _sizes(figures),
        "## Verdicts",
        verdict_table(figures["verdicts"]).markdown(),
        _rule(),
        "## Arms",
        arm_table(figures).markdown(),
        "Means over seeds; in brackets the 95 % interval of the mean. Verdicts do not stand on "
        "these intervals, but on those of the differences between runs of one seed. Times are "
        "those of a machine that may have been shared.",
        *_reasons(figures),
        "![arms, learning rates and verdicts](plot.png)",
        *([kept] if kept else []),
    ]
    return "\n\n".join(parts) + "\n"


def _sizes(figures: Mapping[str, Any]) -> str:
    """Says how large the models are and how long they were trained, in one sentence."""
    runs = [run for arm in figures["arms"].values() for run in arm["runs"].values()]
    if not runs:
        return "No run has ended yet."
    parameters = _range([run["total_parameters"] for run in runs])
    active = _range([run["active_parameters"] for run in runs])
    tokens = _range([run["tokens"] for run in runs])
    return (
        f"Models of {parameters} parameters, {active} of them active, trained on {tokens} tokens."
    )


def _range(numbers: Sequence[float]) -> str:
    """Returns "1,000 to 2,000", or one number where all are equal."""
    low, high = min(numbers), max(numbers)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _rule() -> str:
    return (
        "A claim agrees where the whole 95 % interval (bootstrap over paired seeds) lies on its "
        "side of the bound, disagrees where the whole of it lies on the other side, and is too "
        "small to say otherwise."
    )


def _reasons(figures: Mapping[str, Any]) -> list[str]:
    """Returns a paragraph that says which searches of a learning rate are undecided, and why."""
    reasons = [arm["undecided"] for arm in figures["arms"].values() if arm["undecided"]]
    return [f"Inconclusive: {'; '.join(reasons)}."] if reasons else []


def verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a line for each claim."""
    columns = [*names("claim", "holds if", "paper"), *numbers("measured (95 %)", "seeds")]
    table = Table([*columns, *names("verdict")])
    for each in verdicts:
        interval = Interval(**each["interval"])
        word = each["word"]
        if each["why"]:
            word += f" ({each['why']})"
        measured = f"{interval} {each['unit']}" if interval.number else "-"
        paper = each["paper"] or "-"
        table.add(each["claim"], each["rule"], paper, measured, str(interval.number), word)
    return table


def arm_table(figures: Mapping[str, Any]) -> Table:
    """Returns a line for each arm, with all that is reported of it."""
    # The study names more figures than those of COLUMNS.
    extra = [(name.replace("_", " "), name, "{:.4g}") for name in figures["columns"]]
    columns = [*COLUMNS, *extra]
    figure = figures["figure"].replace("_", " ")
    heads = [heading for heading, _, _ in columns]
    table = Table([*names("arm"), *numbers("learning rate", figure, *heads, "seeds")])
    for name, arm in figures["arms"].items():
        runs = list(arm["runs"].values())
        rate = "-" if arm["rate"] is None else f"{arm['rate']:g}"
        shown = str(judge.interval(values(runs, figures["figure"])))
        cells = [_cell(runs, figure, form) for _, figure, form in columns]
        table.add(name, rate, shown, *cells, str(len(runs)))
    return table


def values(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Returns a figure of each run that has it."""
    return [run[name] for run in runs if run.get(name) is not None]


def _cell(runs: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    """Returns the mean of a figure over the runs that have it, "-" where none has."""
    of_runs = values(runs, name)
    if not of_runs:
        return "-"
    return form.format(statistics.mean(of_runs) * SCALES.get(name, 1.0))


def summary(folder: Path) -> str:
    """Returns the page of all studies that have results, as Markdown."""
    parts = []
    for path in sorted(folder.glob("*/figures.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        # The folder has results of other experiments, too.
        if "verdicts" not in figures:
            continue
        name = figures["name"]
        parts += [
            f"## {figures['question']}",
            f"{figures['paper']}. Equal: {figures['equal']}. "
            f"[Table and plot](../experiments/results/{name}/table.md); "
            f"`python -m experiments.run {name}`, "
            f"{figures['cpu_minutes']:.0f} minutes of one core.",
            _sizes(figures),
            verdict_table(figures["verdicts"]).markdown(),
        ]
    return "\n\n".join(parts)
