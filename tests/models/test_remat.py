"""What the backward pass keeps of a block under each choice of model.remat, as jax tells it."""

import re

import jax
import pytest
import tiny
from jax.ad_checkpoint import print_saved_residuals

from moe_jax.models.stack import NAMES
from moe_jax.schema.config import NAMED_REMAT, REMAT_NAMES
from moe_jax.tasks import TASKS, contract

T, D, H = 16 * 8, 16, 2 * 16  # tokens, width, pre-activations of an expert
FLOAT32 = {"model.param_dtype": "float32", "model.dtype": "float32", "model.repeats": 1}


def block_loss(shape, changes):
    """(the mesh, the sum of losses of a model of one block of its parameters, them)."""
    program = tiny.Program(shape, {**FLOAT32, **changes})
    with jax.set_mesh(program.mesh):
        init = jax.eval_shape(program.model.init, jax.random.key(0))
        batch = tiny.put(program.cfg, tiny.batch(program.cfg))

    def loss(params, router_state):
        model = program.model.bind(params, router_state)
        return contract.forward(TASKS["lm"], model, batch, jax.random.key(0))["nll"]

    return program.mesh, loss, init


def saved(capsys, shape, changes):
    """The shapes of what is kept of a block beside its output, in the order of its computation."""
    mesh, loss, init = block_loss(shape, changes)
    with jax.set_mesh(mesh):
        print_saved_residuals(loss, *init)
    found = []
    for line in capsys.readouterr().out.splitlines():
        if "output of jitted function 'call'" in line:
            sizes = [size.split("@")[0] for size in re.search(r"\[(.*?)\] ", line)[1].split(",")]
            found.append(tuple(int(size) for size in sizes if size.isdecimal()))
    output, *kept = found
    assert output == (16, 8, D)
    return kept


@pytest.mark.parametrize(
    ("remat", "dispatcher"),
    [
        *((remat, "dropless") for remat in ("full", *REMAT_NAMES, "+".join(REMAT_NAMES))),
        ("experts", "capacity"),
    ],
)
def test_a_policy_keeps_what_it_names(remat, dispatcher, capsys):
    kept = saved(capsys, (1, 1, 1), {"model.remat": remat, "model.moe.dispatcher": dispatcher})
    words = remat.split("+")
    # The output of all heads, and a denominator of every query.
    of_attention = [(16, 8, 4, 4), (16, 2, 16)] if "attention" in words else []
    assert kept[: len(of_attention)] == of_attention
    of_moe = kept[len(of_attention) :]
    # Who has the rows of the experts does not need the tokens that they were made of.
    widths = [D, H] if "experts" in words else [D] if "dispatch" in words else []
    assert [shape[-1] for shape in of_moe] == widths
    if words == ["dispatch"] and dispatcher == "dropless":
        # Nothing is repeated for the k experts of a token.
        assert of_moe == [(T, D)]


def test_what_travelled_is_kept_on_a_mesh(capsys):
    changes = {"model.remat": "dispatch", "model.moe.dispatcher": "capacity"}
    assert [shape[-1] for shape in saved(capsys, (2, 2, 2), changes)] == [D]


def test_offload_moves_what_is_kept_to_the_host():
    def moves(offload):
        changes = {"model.remat": "attention+experts", "model.remat_offload": offload}
        mesh, loss, init = block_loss((1, 1, 1), changes)
        with jax.set_mesh(mesh):
            text = str(jax.make_jaxpr(jax.grad(loss))(*init))
        return text.count("device_put")

    # Four arrays, there and back.
    assert moves(True) - moves(False) == 8


def test_every_name_of_the_config_is_a_policy():
    assert tuple(NAMES) == REMAT_NAMES and len(NAMED_REMAT) == 7
