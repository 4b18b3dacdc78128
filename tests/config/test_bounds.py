"""Every key of a config says what it is, every number of one has bounds, and what lies outside of
them is one message with the key, the value and the bound.
"""

import math

import pytest
import tiny

from configs import base
from moe_jax import config
from moe_jax.config import tree
from moe_jax.errors import UserError

# Keys whose value "as another key says" lies outside: `config.build` puts a number there before the
# bounds are looked at.
FILLED = {"mesh.data": -1, "model.head_dim": 0, "train.micro_batch_size": 0, "eval.batch_size": 0}


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(block, path=""):
    """{key: value} of all that is a number, or a tuple of numbers, in a nested dict."""
    found = {}
    for key, value in block.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            found |= numbers(value, name)
        elif is_number(value) or (
            isinstance(value, tuple) and value and all(map(is_number, value))
        ):
            found[name] = value
    return found


KEYS = {key.path: key for key in tree.keys()}
NUMBERS = numbers(base.get_config().to_dict())
BOUNDS = {path: key.option.bound for path, key in KEYS.items() if key.option.bound}


def test_every_number_of_the_config_has_bounds_and_lies_within():
    assert BOUNDS.keys() == NUMBERS.keys()
    for path, value in NUMBERS.items():
        several = value if isinstance(value, tuple) else (value,)
        assert all(isinstance(number, int) == BOUNDS[path].whole for number in several), path
        assert FILLED.get(path) == value or all(map(BOUNDS[path].holds, several)), path


def test_every_key_says_what_it_is_and_every_default_may_be_chosen():
    for path, key in KEYS.items():
        assert key.option.comment, path
        assert not key.option.choices or key.default in key.option.choices, path
    for choice in tree.choices():
        assert KEYS[choice.path].default in choice.options, choice.path


def refusal(path, value):
    """What is said of a value; the block that has the key is chosen."""
    raw = tiny.raw({"mesh.data": 1})
    *parents, key = path.split(".")
    block, name = ".".join(parents[:-1]), parents[-1] if parents else ""
    for choice in tree.choices():
        if choice.blocks == block:
            *place, chosen = choice.path.split(".")
            _at(raw, place)[chosen] = name
    _at(raw, parents)[key] = value
    with pytest.raises(UserError) as error:
        config.build(raw, 1)
    return str(error.value)


def _at(raw, path):
    for part in path:
        raw = raw[part]
    return raw


@pytest.mark.parametrize("path", [path for path in NUMBERS if not path.startswith("mesh.")])
def test_no_number_is_wrong_silently(path):
    """Far below, not a number, infinite, a string and a boolean."""
    for value in (-(10**6), math.nan, math.inf, "1", True):
        given = (value,) if isinstance(NUMBERS[path], tuple) else value
        said = refusal(path, given)
        assert path in said and str(value) in said and " must be " in said, said
    if BOUNDS[path].whole:
        assert path in refusal(path, (1.5,) if isinstance(NUMBERS[path], tuple) else 1.5)


@pytest.mark.parametrize(
    ("path", "value", "bound"),
    [
        ("optim.schedules.cosine.final_fraction", -10.0, "at least 0 and at most 1"),
        ("optim.schedules.cosine.final_fraction", 10.0, "at least 0 and at most 1"),
        ("optim.schedules.wsd.decay_fraction", 20, "at least 0 and at most 1"),
        ("optim.optimizers.muon.adam_learning_rate", -1.0, "at least 0"),
        ("optim.optimizers.adafactor.decay_rate", 1.5, "above 0 and at most 1"),
        ("model.depth.capacity", 12.0, "above 0 and at most 1"),
        ("model.moe.adaptive.target_drop", 5, "at least 0 and at most 1"),
        ("model.moe.sparse.rules.rigl.fraction", 30, "at least 0 and at most 1"),
        ("model.moe.sparse.patterns.units.density", 25, "above 0 and at most 1"),
        ("model.kinds.article.num_classes", 1, "0 or at least 2"),
        ("tasks.recommendation.min_items", 1, "at least 2"),
        # jax.random.key(2**32) is key(0)
        ("seed", 2**32, "at least 0 and below 2**32"),
    ],
)
def test_a_number_out_of_its_range_is_refused(path, value, bound):
    assert f"{path} = {value} must be {bound}" in refusal(path, value)
