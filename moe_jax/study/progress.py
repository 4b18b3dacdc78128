"""What of a study is done, and which cells come next."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax import config
from moe_jax.study import bracket, expand, ledger
from moe_jax.study.contract import Cell, Figures, Study
from moe_jax.study.ledger import Line


class Arm(NamedTuple):
    """The state of an arm.

    Fields:
      rate: the learning rate that is compared; NaN before it is known.
      undecided: why the verdict cannot stand on this arm; "" = it can.
      tried: the figure of each learning rate of the search, None where the run diverged.
    """

    rate: float
    undecided: str
    tried: dict[float, float | None]


class State(NamedTuple):
    """The state of a study: arms by name, runs that are compared, and the cells that are next.

    Fields:
      runs: figures by seed and arm.
      lines: of the ledger, of all runs in `runs`.
      searched: of the ledger, of the runs that searched a learning rate.
      missing: cells that can be trained now and are not done; others may follow them.
    """

    arms: dict[str, Arm]
    runs: dict[int, dict[str, Figures]]
    lines: list[Line]
    searched: list[Line]
    missing: list[Cell]


def look(study: Study, done: Mapping[str, Line], *, short: bool = False) -> State:
    """Returns the state of a study by the ledger. `short`: of its smoke runs.

    A smoke run searches no learning rate and has one seed.
    """
    state = State({}, {}, [], [], [])
    seeds = study.seeds[:1] if short else study.seeds
    for name in study.arms:
        # 1. The search of the learning rate, with a seed of its own.
        arm, wanted, lines = _arm(study, name, done, short)
        state.arms[name] = arm
        state.searched.extend(lines)
        state.missing.extend(wanted)
        if math.isnan(arm.rate):
            continue
        # 2. The runs that are compared, at the rate that was found.
        for seed in seeds:
            cell = expand.cell(study, name, seed, arm.rate, short=short)
            line = ledger.find(done, cell)
            if line:
                figures = with_derived(study, cell, line["figures"])
                state.runs.setdefault(seed, {})[name] = figures
                state.lines.append(line)
            elif not wanted:
                state.missing.append(cell)
    return state


def with_derived(study: Study, cell: Cell, figures: Figures) -> Figures:
    """Returns the figures of a run, and those that the study makes of them."""
    if not study.derived:
        return figures
    # The cell has the config that was trained, or the ledger would not have its line.
    cfg = config.build(cell.raw, 1)
    derived = {name: of(cfg, figures) for name, of in study.derived.items()}
    return {**figures, **derived}


def _arm(
    study: Study, name: str, done: Mapping[str, Line], short: bool
) -> tuple[Arm, list[Cell], list[Line]]:
    """Returns the state of an arm, the cells that its search wants, and the lines that it has."""
    if short or not study.searches(name):
        return Arm(expand.arm_rate(study, name), "", {}), [], []
    tried: dict[float, float | None] = {}
    missing: dict[float, list[Cell]] = {}
    lines = []
    for rate in bracket.rates(study):
        cells = tuning_cells(study, name, rate)
        found_lines = [ledger.find(done, cell) for cell in cells]
        known = [line for line in found_lines if line]
        lines += known
        missing[rate] = [cell for cell, line in zip(cells, found_lines, strict=True) if not line]
        if not missing[rate]:
            tried[rate] = _mean([line["figures"].get(study.figure) for line in known])
    # A rate at which a run diverged is worse than any other.
    figures = {rate: math.inf if value is None else value for rate, value in tried.items()}
    found = bracket.search(study, figures)
    wanted = [cell for rate in found.wanted for cell in missing[rate]]
    undecided = ""
    if wanted or math.isnan(found.best):
        undecided = f"the learning rate of {name} is not known"
    elif not found.interior:
        undecided = f"the best learning rate of {name}, {found.best:g}, is at the end of its search"
    # While a rate is wanted the best one may still change, so nothing is compared at it.
    rate = math.nan if wanted else found.best
    return Arm(rate, undecided, tried), wanted, lines


def tuning_cells(study: Study, arm: str, rate: float) -> list[Cell]:
    """Returns the cells that try a learning rate of an arm, one a seed of the search."""
    return [expand.cell(study, arm, seed, rate, searches=True) for seed in study.tuning_seeds]


def _mean(figures: list[float | None]) -> float | None:
    """Returns the mean of some figures; None where one is None, because its run diverged."""
    known = [figure for figure in figures if figure is not None]
    return statistics.fmean(known) if len(known) == len(figures) else None


def everything(study: Study, done: Mapping[str, Line], *, short: bool = False) -> list[Cell]:
    """Returns the cells that a study needs by what is known: at least so many, for a search may go
    on.

    Seeds of an arm whose rate is not known yet are taken at the rate where its search begins.
    """
    state = look(study, done, short=short)
    # By key: a cell of the search may be one of the seeds, and counts once.
    cells = {cell.key: cell for cell in state.missing}
    seeds = study.seeds[:1] if short else study.seeds
    for name, arm in state.arms.items():
        rate = expand.arm_rate(study, name) if math.isnan(arm.rate) else arm.rate
        of_arm = [expand.cell(study, name, seed, rate, short=short) for seed in seeds]
        for tried in arm.tried:
            of_arm += tuning_cells(study, name, tried)
        cells |= {cell.key: cell for cell in of_arm}
    return list(cells.values())
