"""A config on tests/tiny.py with something to break for every fault, and references of it that
several tests share.
"""

import functools

import tiny

from moe_jax.verify import states
from moe_jax.verify.run import reference

STEPS = 2
# One MoE block whose capacity drops, dropout and a balance loss that counts.
BREAKABLE = {
    "model.repeats": 1,
    "model.head_dim": 4,
    "model.dropout": 0.1,
    "model.moe.dispatcher": "capacity",
    "model.moe.dispatchers.capacity.factor": 1.0,
    "model.moe.losses.balance": 0.1,
    "optim.learning_rate": 1e-2,
    "optim.warmup_steps": 1,
    "data.seq_len": 16,
}


def references(tmp_path_factory, config):
    """Returns changes -> (the reference of a config with them, a directory with its first state).

    `changes` are pairs of keys and values.
    """

    @functools.cache
    def make(changes):
        folder = tmp_path_factory.mktemp("reference")
        one = reference(tiny.raw(config | dict(changes)), STEPS)
        states.write(one.program, one.begin, folder / "begin")
        return one, folder

    return make
