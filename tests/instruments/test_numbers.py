"""What other numbers in the feed-forwards cost a model: `probe --what precision --numbers`."""

import dataclasses

import jax
import meshes
import numpy as np
import pytest
from instrument_cases import probed, with_

from moe_jax.config import rules
from moe_jax.errors import UserError
from moe_jax.instruments import numbers, tables


@pytest.fixture
def run(float64):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        yield probed()


def test_each_kind_of_numbers_has_its_flips_and_its_loss(run):
    result = numbers.measure(run, ["full", "int8", "float8"])
    assert list(result) == ["full", "int8", "float8"]
    for name in ("int8", "float8"):
        figures = result[name]
        assert figures["gap/loss"] == figures["loss"] - result["full"]["loss"]
        assert 0 < abs(figures["gap/loss"]) < 0.1
        # The first layer routes before any feed-forward has rounded.
        assert figures["flips"][0] == 0 and len(figures["flips"]) == 2
    text = tables.of_numbers(result)[0].markdown()
    assert "int8" in text and f"{result['float8']['loss']:.4f}" in text


def test_rounding_what_narrow_numbers_hold_costs_nothing(run):
    """Experts of zeros: whatever they are rounded to, their products are the same."""
    zeros = run
    for layer in (0, 1):
        zeros = zeros._replace(
            params=with_(
                zeros,
                layer,
                lambda moe: {"w_in": 0 * moe["w_in"]},
            )
        )
    result = numbers.measure(zeros, ["int8"])
    assert result["int8"]["gap/loss"] == 0 and not any(result["int8"]["flips"])


def test_numbers_that_do_not_go_with_the_mesh_are_a_note(run):
    split = run.cfg.mesh._replace(model=2)
    narrow = dataclasses.replace(run.cfg.model, ffn_numbers="int8")
    message = r"model.ffn_numbers = \"int8\" needs the whole hidden row .* mesh.model \(2\)"
    with pytest.raises(UserError, match=message):
        rules.enforce(dataclasses.replace(run.cfg, mesh=split, model=narrow))
    # The model's own stays, the others say why they are not there.
    result = numbers.measure(run._replace(cfg=dataclasses.replace(run.cfg, mesh=split)), ["int8"])
    assert "mesh.model (2)" in result["int8"]["note"]
    assert np.isfinite(result["full"]["loss"])
    assert any("no int8: " in str(line) for line in tables.of_numbers(result))
