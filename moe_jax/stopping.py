"""How a run ends before its time: a signal that all processes agree on, or a loss that is not a number."""

import os
import signal
from collections.abc import Sequence
from types import FrameType

import jax
import numpy as np


class NonFinite(RuntimeError):
    """The loss or a gradient was not finite more often in a row than train.nonfinite_patience allows."""


class Interrupt:
    """Ctrl-C and SIGTERM ask the loop to save and end after the step it is in; a second signal ends the process at once.

    With several processes the loop must end at one step on all of them: `due` sums up the signals of all.
    """

    def __init__(self, every: int):
        self.signal = 0
        self._every = every if jax.process_count() > 1 else 1
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def due(self, step: int) -> bool:
        """To be asked by all processes after the same steps."""
        if jax.process_count() == 1:
            return bool(self.signal)
        if step % self._every:
            return False
        from jax.experimental import multihost_utils

        self.signal = int(multihost_utils.process_allgather(np.int32(self.signal)).max())
        return bool(self.signal)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def first_broken(names: Sequence[str], finite: np.ndarray) -> str:
    """The parameter whose gradient went wrong first: of those not finite, the one that the backward pass reaches first.

    The backward pass walks from the head to the embedding, so that is the one nearest to the loss.
    """
    broken = [name for name, ok in zip(names, finite, strict=True) if not ok]
    return max(broken, key=_depth) if broken else "none: the loss itself"


def _depth(name: str) -> tuple[int, ...]:
    """The place of a parameter in the forward pass of any model; what is not named here (of an input) comes before the blocks."""
    encoder, parts = name.startswith("encoder/"), name.removeprefix("encoder/").split("/")
    order = {"embed": 0, "prefix": 2, "repeats": 3, "experts": 3, "suffix": 4, "norm_scale": 5, "towers": 6, "head": 7}
    stage = order.get(parts[1] if parts[0] == "ends" else parts[0], 1)
    after_cross = any(part.startswith(("cross", "ffn", "moe", "dense")) for part in parts)
    inside = ("attention_norm_scale", "cross_norm_scale", "q", "k", "v", "o", "ffn_norm_scale", "gate", "w_in", "w_out")
    last = inside.index(parts[-1]) if parts[-1] in inside else 0
    return (not encoder, stage, *(int(part) for part in parts if part.isdigit()), after_cross, last)
