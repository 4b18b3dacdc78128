"""The layout of layers: names, numbers, and that both layouts of one model hold the same arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax import layout
from moe_jax.models.encdec import Options

PATTERN = {
    "model.prefix": ("dense", "moe"),
    "model.period": ("moe", "dense", "moe"),
    "model.suffix": ("moe",),
    "model.repeats": 2,
}


def model(scan, **changes):
    cfg = tiny.build(changes=PATTERN | {"model.scan": scan}).model
    return dataclasses.replace(cfg, **changes)


def encdec(scan):
    encoder = {"prefix": (), "period": ("moe", "dense"), "repeats": 2, "suffix": ()}
    options = {f"encoder_{name}": value for name, value in encoder.items()}
    return model(scan, kind="encdec", kind_options=Options(**options))


@pytest.mark.parametrize(
    ("keys", "loop", "stacked"),
    [
        (("prefix", 1), 1, 1),
        (("repeats", 1, "blocks", 2), 7, None),
        (("repeats", "blocks", 2), None, [4, 7]),
        (("suffix", 0), 8, 8),
        (("ends", "embed"), None, None),
    ],
    ids=str,
)
def test_blocks_are_numbered_in_the_order_in_which_they_run(keys, loop, stacked):
    for scan, number in ((False, loop), (True, stacked)):
        if number is not None:
            np.testing.assert_array_equal(layout.block_numbers(keys, model(scan)), number)
    if loop is None and stacked is None:
        assert layout.block_numbers(keys, model(False)) is None


def test_moe_layers_are_numbered_among_those_with_experts_an_encoders_first():
    assert layout.moe_blocks(model(False)).tolist() == [1, 2, 4, 5, 7, 8]
    last = ("repeats", "blocks", 2)
    assert layout.moe_layer_numbers(last, model(True)).tolist() == [2, 4]
    assert layout.moe_layer_numbers(last, encdec(True)).tolist() == [4, 6]
    of_encoder = ("encoder", "repeats", "blocks", 0)
    assert layout.moe_layer_numbers(of_encoder, encdec(True)).tolist() == [0, 1]
    assert len(encdec(True).blocks) == 4 + 9
    assert layout.block_numbers(("encoder", "ends", "norm_scale"), encdec(True)) is None


def states(cfg):
    """A tree of one array for each MoE layer, in the layout of `cfg`; all zeros."""

    def block(shape):
        return {"moe": {"state": {"bias": jnp.zeros(shape)}}}

    n, inner = cfg.repeats, [0, 2]
    if cfg.scan:
        repeats = {"blocks": {i: block((n, 4)) for i in inner}}
    else:
        repeats = {r: {"blocks": {i: block((4,)) for i in inner}} for r in range(n)}
    return {"prefix": {1: block((4,))}, "repeats": repeats, "suffix": {0: block((4,))}}


@pytest.mark.parametrize("scan", [False, True])
def test_arrays_of_moe_layers_go_in_their_order_and_come_back(scan):
    cfg = model(scan)
    values = {"bias": jnp.arange(6.0)[:, None] + jnp.zeros((6, 4))}
    tree = layout.into_moe_layers(values, states(cfg), cfg)
    np.testing.assert_array_equal(layout.by_moe_layer(tree, cfg)["bias"], values["bias"])
    loop = layout.unstack(tree, cfg)
    assert jax.tree.structure(loop) == jax.tree.structure(states(model(False)))
    assert float(loop["repeats"][1]["blocks"][0]["moe"]["state"]["bias"][0]) == 3


def test_names_on_disk_are_those_of_the_loop():
    name = "params/repeats/blocks/0/moe/w"
    assert layout.layer_names(name, (2, 3), scan=True) == [
        "params/repeats/0/blocks/0/moe/w",
        "params/repeats/1/blocks/0/moe/w",
    ]
    assert layout.layer_names(name, (2, 3), scan=False) is None
    assert layout.layer_names("params/ends/embed", (2, 3), scan=True) is None
    with pytest.raises(ValueError, match="is a scalar below"):
        layout.layer_names(name, (), scan=True)
    loop, scan = ("repeats", 1, "blocks", 0), ("repeats", "blocks", 0)
    assert layout.without_repeat(loop) == (scan, 1) and layout.without_repeat(scan) == (scan, 0)
