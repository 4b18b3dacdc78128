"""States on disk: written on one mesh, read on another, equal to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.checkpoint import Checkpoints
from moe_jax.train_step import State
from moe_jax.verify.program import Program

# Of a model's blocks, in their order.
PARTS = {"prefix": 0, "repeats": 1, "suffix": 2}
# What is compared of a state; moments follow from the gradients.
COMPARED = ("params/", "router_state/", "ema/", "masks/")


def write(program: Program, now: State, directory: Path) -> None:
    """Writes a state as a checkpoint in `directory`."""
    with program.entered():
        checkpoints = Checkpoints(directory, every=0, keep=1, keep_best=0)
        checkpoints.save(0, now, metadata={}, score=None, stacked=program.cfg.model.scan)
        checkpoints.close()


def read(program: Program, directory: Path) -> State:
    """Returns the state in `directory`, on the mesh of `program`."""
    with program.entered():
        checkpoints = Checkpoints(directory, every=0, keep=1, keep_best=0)
        return checkpoints.restore(0, program.abstract, stacked=program.cfg.model.scan)


def named(program: Program, now: State) -> dict[str, np.ndarray]:
    """Returns what is compared of a state, by name."""
    with program.entered():
        return {name: x for name, x in program.named(now).items() if name.startswith(COMPARED)}


def of_routers(program: Program, now: State) -> list[dict[str, np.ndarray]]:
    """Returns the states of the MoE layers' routers in the order of the blocks; [] where routers
    have none.

    They are sorted by their names, and not numbered by moe_jax.layout, which is part of what is
    proven.
    """
    by_position: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}
    for name, value in named(program, now).items():
        if name.startswith("router_state/"):
            # "router_state/repeats/0/blocks/1/moe/state/bias"
            *path, last = name.split("/")[1:]
            # Numbers as numbers: as texts, 10 would come before 2.
            numbers = [int(part) if part.isdecimal() else PARTS.get(part, 0) for part in path]
            # An encoder runs before its decoder.
            position = (path[0] != "encoder", *numbers)
            by_position.setdefault(position, {})[last] = value
    return [by_position[position] for position in sorted(by_position)]


def unequal(program: Program, now: State, reader: Program, directory: Path) -> list[str]:
    """Writes a state of `program`, reads it on the mesh of `reader`, and returns the names of the
    arrays that differ in a bit.
    """
    write(program, now, directory)
    back = read(reader, directory)
    with program.entered():
        want = program.named(now)
    with reader.entered():
        have = reader.named(back)
    return differ(want, have)


def differ(want: dict[str, np.ndarray], have: dict[str, np.ndarray]) -> list[str]:
    """Returns the names of the arrays that differ in a bit."""

    def same(a, b):
        # Bytes, so that NaN equals itself and 0 does not equal -0.
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()

    return sorted(name for name in want.keys() | have.keys() if not same(want[name], have[name]))
