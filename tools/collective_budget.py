"""Writes what devices send each other in a step of configs/debug.py on every mesh of eight:
tests/plan/collective_budget.json, which tests/plan/test_budget.py compares with.

    PYTHONPATH=. python tools/collective_budget.py

Run it when a change is meant to change the traffic, and read the difference before you commit it.
The figures are those of one version of jax; those of others stay as they are. Two minutes.
"""

import json
import re
from pathlib import Path

import jax

from moe_jax import config
from moe_jax.config import config_file
from moe_jax.parallel import mesh
from moe_jax.parallel.compiling import QUICK
from moe_jax.plan.compiling import compile_step
from moe_jax.plan.hlo import program

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "plan" / "collective_budget.json"
NUM_DEVICES = 8
# As many heads as the widest model axis splits.
CHANGES = {"model.num_heads": 8, "model.num_kv_heads": 8}


def version() -> str:
    """Returns the version of jax, without its last number."""
    return ".".join(jax.__version__.split(".")[:2])


def measure(lengths: mesh.Lengths) -> dict[str, list[int]]:
    """Returns {"kind over axes": [number, bytes]} of a step on a mesh."""
    written = {f"mesh.{axis}": length for axis, length in lengths.written().items()}
    raw = config_file.read(ROOT / "configs" / "debug.py", CHANGES | written)
    cfg = config.build(raw, NUM_DEVICES)
    with jax.set_mesh(mesh.make(lengths)):
        compiled = compile_step(cfg, QUICK).compiled
    found = program.read(compiled.as_text(), lengths._asdict()).collectives
    totals: dict[str, list[int]] = {}
    for one in found:
        total = totals.setdefault(f"{one.kind} over {one.axes}", [0, 0])
        total[0] += one.count
        total[1] += one.num_bytes
    return dict(sorted(totals.items()))


def read() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Returns {version of jax: {mesh: what `measure` returned}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    mesh.simulate(NUM_DEVICES)
    budgets = read()
    budgets[version()] = {}
    for lengths in mesh.all_of(NUM_DEVICES):
        budgets[version()][str(lengths)] = measure(lengths)
        print(lengths, sum(sent for _, sent in budgets[version()][str(lengths)].values()))
    text = json.dumps(budgets, indent=1, sort_keys=True)
    # A pair in a line.
    FILE.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")


if __name__ == "__main__":
    main()
