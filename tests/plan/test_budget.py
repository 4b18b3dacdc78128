"""What devices send each other in a step of the debug config is what it was: one byte more, or one
collective more, fails.

`PYTHONPATH=. python tools/collective_budget.py` writes the figures anew.
"""

import importlib.util
from pathlib import Path

import pytest

from moe_jax.parallel import mesh

PATH = Path(__file__).parents[2] / "tools" / "collective_budget.py"
spec = importlib.util.spec_from_file_location("collective_budget", PATH)
budget = importlib.util.module_from_spec(spec)
spec.loader.exec_module(budget)

# A mesh in which every axis splits something, and one of expert parallelism alone.
NORMAL = ("2x2x2",)
COMMAND = "PYTHONPATH=. python tools/collective_budget.py"


def compared(text):
    known = budget.read().get(budget.version())
    assert known, (
        f"no figures for jax {budget.version()}: PYTHONPATH=. python tools/collective_budget.py"
    )
    wanted, found = known[text], budget.measure(mesh.parse(text, "--mesh"))
    more = {
        name: (wanted.get(name), found.get(name))
        for name in wanted.keys() | found.keys()
        if wanted.get(name) != found.get(name)
    }
    assert not more, f"{text}: (was, is): {more}; if it is meant to: {COMMAND}"


@pytest.mark.parametrize("text", NORMAL)
def test_a_step_sends_what_it_did(text):
    compared(text)


@pytest.mark.full
@pytest.mark.parametrize("text", [str(one) for one in mesh.all_of(8) if str(one) not in NORMAL])
def test_a_step_sends_what_it_did_on_every_mesh(text):
    compared(text)


def test_every_mesh_has_its_figures():
    for version, known in budget.read().items():
        assert sorted(known) == sorted(str(one) for one in mesh.all_of(8)), version
