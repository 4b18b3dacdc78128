"""Topologies as they are written, and what is no topology."""

import importlib.util

import pytest

from moe_jax.errors import UserError
from moe_jax.plan import topology


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("cpu:8", 8),
        ("v5e:4x4", 16),
        ("2*v5e:4x4", 32),
        ("v5p:8x8x8", 512),
        # Two devices of a chip.
        ("tpu7x:2x2x1", 8),
        ("h100:8", 8),
        ("h100:8x8", 64),
    ],
)
def test_a_topology_has_so_many_devices(text, number):
    assert topology.parse(text).num_devices == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "write cpu:N, or one of v5e, v5p, v6e, tpu7x, a100, h100, h200, b200"),
        ("v5e", "write cpu:N, or one of"),
        ("v5e:4x4x4", "a slice of v5e has 2 dimensions, as in v5e:4x4"),
        ("v5p:4x4", "a slice of v5p has 3 dimensions, as in v5p:4x4x4"),
        ("2*h100:8x8", "write h100:8x8 (hosts x GPUs)"),
        ("cpu:2x4", "write cpu:8"),
        ("v5e:0x4", "every length is at least 1"),
    ],
)
def test_what_is_no_topology_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        topology.parse(text)
    said = str(error.value)
    assert said.startswith(f"--topology {text}: ") and message in said and "\n" not in said


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda")])
def test_without_its_compiler_one_line_says_which_extra(text, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"with its extra \[{extra}\], or plan with"):
        topology.devices(topology.parse(text))


def test_simulated_devices_are_those_of_this_machine():
    found = topology.devices(topology.parse("cpu:8"))
    assert len(found) == 8 and found[0].platform == "cpu"
