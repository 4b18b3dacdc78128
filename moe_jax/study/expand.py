"""Cells of a study: configs that are built and checked, with the key of each.

Every cell of a study is built before the first is trained, so a mistake in a declaration is told
within seconds.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax import config
from moe_jax.config import config_file, smoke
from moe_jax.errors import UserError
from moe_jax.plan import flops
from moe_jax.study.contract import RATE, Cell, Changes, Study

# Of every cell: one device, one evaluation at the end. Cells write no checkpoints: they are short,
# and one that was interrupted is trained again.
PLAIN = {
    "mesh.data": 1,
    "eval.every": 0,
    "eval.sample_tokens": 0,
    "log.tensorboard": False,
    "compile_cache": "",
}
# Blocks of the config that do not change a figure.
NO_MATTER = (
    "compile_cache",
    "checkpoint",
    "faults",
    "limits",
    "log",
    "mesh",
    "mesh_fallbacks",
    "profile",
    "record",
    "simulate_devices",
)
# Expected of one core of a usual machine, until the ledger knows better: seconds of compilation, of
# what a step takes beside its products, and useful FLOP/s.
COMPILE, STEP, SPEED = 25.0, 0.015, 1.2e10
STARTUP = 15.0
# Added to the seed of an arm, the seed of the dense model that it begins from: the arm goes on with
# other text than that model has seen.
PARENT_SEED = 5000


def cell(
    study: Study, arm: str, seed: int, rate: float, *, short: bool = False, searches: bool = False
) -> Cell:
    """Returns a cell.

    Raises UserError, by study and arm, for keys that do not exist or that the rules refuse.

    Args:
      short: of a few steps, to see that it works.
      searches: it only tries a learning rate: nothing further is measured, so that studies which
        measure different things share the run.
    """
    parent = None
    if arm in study.parents:
        keys = study.parents[arm]
        parent = _cell(study, f"parent of {arm}", keys, seed + PARENT_SEED, keys[RATE], short)
    measures = () if searches else study.measures
    return _cell(study, arm, study.arms[arm], seed, rate, short, measures, parent)


def _cell(
    study: Study,
    arm: str,
    keys: Changes,
    seed: int,
    rate: float,
    short: bool,
    measures: tuple[str, ...] = (),
    parent: Cell | None = None,
) -> Cell:
    """Returns the cell of an arm, or of a parent, by its changed keys."""
    changes = json.dumps([{**PLAIN, **study.base, **keys}, short])
    raw, cfg, program = _built(study.config, changes, f"{study.name}, arm {arm}: ")
    raw = {**raw, "seed": seed, "optim": {**raw["optim"], "learning_rate": rate}}
    optim = dataclasses.replace(cfg.optim, learning_rate=rate)
    own = dataclasses.replace(cfg, seed=seed, optim=optim)
    key = digest(own, measures, parent)
    seconds = expected_seconds(cfg)
    return Cell(arm, seed, rate, raw, measures, key, values_of(own), program, seconds, parent)


@functools.lru_cache(maxsize=256)
def _built(file: str, changes: str, at: str) -> tuple[dict[str, Any], config.Config, str]:
    """Returns the config of an arm, as values and built, and the digest of its program."""
    # JSON, for a dict is no key of a cache.
    values, short = json.loads(changes)
    raw = config_file.read(Path(file), values, at)
    if short:
        raw, _ = smoke.shorten(raw)
    try:
        cfg = config.build(raw, 1)
    except UserError as error:
        raise UserError(f"{at}{error}") from None
    return raw, cfg, digest(neutral(cfg), ())


def arm_rate(study: Study, arm: str) -> float:
    """Returns the learning rate that an arm declares, or where its search begins."""
    return {RATE: study.rate, **study.base, **study.arms[arm]}[RATE]


def neutral(cfg: config.Config) -> config.Config:
    """Returns the config without what a compiled program takes as an argument."""
    optim = dataclasses.replace(cfg.optim, learning_rate=1.0)
    return dataclasses.replace(cfg, seed=0, optim=optim)


def digest(cfg: config.Config, measures: tuple[str, ...], parent: Cell | None = None) -> str:
    """Returns 16 digits of the SHA-256 of all that decides the figures of a run, but for values
    that are their defaults: a key that is new in a later version changes no digest.
    """
    blocks = changed(cfg)
    kept = {name: value for name, value in blocks.items() if name not in NO_MATTER}
    decides = [kept, measures] if parent is None else [kept, measures, parent.key]
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changed(block: Any) -> dict[str, Any]:
    """Returns the fields of a frozen config that are not their defaults, as nested dicts."""
    found = {}
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            found[field.name] = changed(value) if dataclasses.is_dataclass(value) else value
    return found


def values_of(cfg: config.Config) -> dict[str, Any]:
    """Returns all values that decide the figures of a run, as JSON has them."""
    blocks = dataclasses.asdict(cfg)
    kept = {name: value for name, value in blocks.items() if name not in NO_MATTER}
    return json.loads(json.dumps(kept, default=str))


def expected_seconds(cfg: config.Config) -> float:
    """Returns how long a cell takes without compilation, by its steps and FLOPs."""
    return cfg.train.steps * STEP + train_flops(cfg) / SPEED


def train_flops(cfg: config.Config) -> float:
    """Returns the useful FLOPs of a whole run (plan/flops.py)."""
    return tokens(cfg) * flops.train_per_token(cfg.model, cfg.data.seq_len)


def tokens(cfg: config.Config) -> int:
    return cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len


def packs(cells: list[Cell]) -> list[list[Cell]]:
    """Returns cells in packs that share a compiled program, the longest pack first."""
    by_program: dict[str, list[Cell]] = {}
    for each in cells:
        by_program.setdefault(each.program, []).append(each)
    return sorted(by_program.values(), key=lambda pack: -sum(each.seconds for each in pack))


def seconds_of(pack: list[Cell], measured: Mapping[str, float]) -> float:
    """Returns how long a pack takes; `measured` has seconds of a cell by its program."""
    program = pack[0].program
    each = measured.get(program)
    training = sum(each if each is not None else cell.seconds for cell in pack)
    return STARTUP + COMPILE + training


def as_json(pack: list[Cell]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(each) for each in pack]


def from_json(pack: list[dict[str, Any]]) -> list[Cell]:
    return [_from_json(each) for each in pack]


def _from_json(values: Mapping[str, Any]) -> Cell:
    parent = _from_json(values["parent"]) if values["parent"] else None
    # JSON has no tuples.
    return dataclasses.replace(Cell(**values), measures=tuple(values["measures"]), parent=parent)
