"""How a run ends before its time: a signal that all processes agree on, or a loss that is not a
number.
"""

from collections.abc import Sequence

import jax
import numpy as np

from moe_jax.runtime import signals
from moe_jax.runtime.watchdog import WATCHDOG


class NonFinite(RuntimeError):
    """The loss or a gradient was not finite more often in a row than train.nonfinite_patience
    allows.
    """


class Interrupted(Exception):
    """A signal asks the run to save its state and end."""


def due(step: int, start: int, every: int) -> bool:
    """Returns whether the run is to save and end after a step.

    All processes have to ask after the same steps. Several processes ask each other after the first
    step behind `start`, and after every `every` steps.
    """
    alone = jax.process_count() == 1
    # Asking others costs a collective, so it is not done after every step.
    asks = alone or step == start + 1 or step % every == 0
    return _agreed() if asks else False


def check() -> None:
    """Raises Interrupted when the run is to end: to be called between the batches of all that takes
    long, by all processes alike.

    Does nothing outside of a training run.
    """
    WATCHDOG.alive()
    if _agreed():
        raise Interrupted


def check_alone() -> None:
    """Does as `check` in a run of one process, and else nothing.

    It is for what process 0 does while the others wait for it: none may leave by itself.
    """
    if jax.process_count() == 1:
        check()


def _agreed() -> bool:
    heard = signals.LISTENER
    if not heard.noting:
        return False
    if jax.process_count() == 1:
        return heard.number > 0
    from jax.experimental import multihost_utils

    # 0 is none, so the largest number is a signal that some process has heard. It is the same in
    # every process, so all of them stop at the same step.
    number = int(multihost_utils.process_allgather(np.int32(heard.number)).max())
    heard.agree(number)
    # By what was agreed, and not by what this process may have heard since.
    return number > 0


def first_broken(names: Sequence[str], finite: np.ndarray) -> str:
    """Returns the parameter whose gradient went wrong first: of those not finite, the one that the
    backward pass reaches first.

    The backward pass walks from the head to the embedding, so that is the one nearest to the loss.
    """
    broken = [name for name, ok in zip(names, finite, strict=True) if not ok]
    return max(broken, key=_depth) if broken else "none: the loss itself"


def _depth(name: str) -> tuple[int, ...]:
    """Returns the place of a parameter in the forward pass of any model.

    What is not named here belongs to an input, and comes before the blocks.
    """
    encoder, parts = name.startswith("encoder/"), name.removeprefix("encoder/").split("/")
    order = {
        "embed": 0,
        "prefix": 2,
        "repeats": 3,
        "experts": 3,
        "suffix": 4,
        "norm_scale": 5,
        "towers": 6,
        "mtp": 6,
        "head": 7,
    }
    # What stands below "ends" is named by its second part: "ends/embed", "ends/head".
    stage = order.get(parts[1] if parts[0] == "ends" else parts[0], 1)
    # A block has its attention first, then (cross attention and) the feed-forward part.
    after_cross = any(part.startswith(("cross", "ffn", "moe", "dense")) for part in parts)
    inside = (
        "attention_norm_scale",
        "cross_norm_scale",
        "q_a",
        "q_b",
        "q",
        "kv_a",
        "kv_b",
        "k",
        "v",
        "sinks",
        "o",
        "o_bias",
        "attention_after_norm_scale",
        "cross_after_norm_scale",
        "ffn_norm_scale",
        "gate",
        "w_in",
        "w_out",
        "ffn_after_norm_scale",
    )
    last = inside.index(parts[-1]) if parts[-1] in inside else 0
    return (
        not encoder,
        stage,
        # Repeats and blocks are numbered in the order in which they run.
        *(int(part) for part in parts if part.isdecimal()),
        after_cross,
        last,
    )
