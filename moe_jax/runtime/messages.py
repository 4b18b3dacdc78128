"""Texts that the processes of a run send each other, from any thread.

They go through the key-value store of jax.distributed, which process 0 holds. A thread in the
background may not use the collectives of the devices: they could meet those of a training step in
another order on another process.

A name is used once in a run.
"""

from typing import Any

import jax

ROOT = "moe_jax/message/"
# What is waited for may take long: gigabytes are read. Nobody waits for a process that has died:
# the others are ended (runtime/cluster.py).
LONGEST_MS = 24 * 3600 * 1000


def send(name: str, text: str) -> None:
    """Sends a text, which whoever knows its name receives."""
    _store().key_value_set(ROOT + name, text)


def receive(name: str, *, forget: bool = False) -> str:
    """Waits for a text and returns it.

    `forget`: nobody else receives it, so that the store need not keep it.
    """
    text = _store().blocking_key_value_get(ROOT + name, LONGEST_MS)
    if forget:
        _store().key_value_delete(ROOT + name)
    return text


def gather(name: str, text: str) -> list[str]:
    """Returns the texts of all processes, by their numbers. All of them call it."""
    if jax.process_count() == 1:
        return [text]
    send(f"{name}/{jax.process_index()}", text)
    return [receive(f"{name}/{process}") for process in range(jax.process_count())]


def _store() -> Any:
    """Returns the client of the key-value store; the public API of jax has none."""
    from jax._src import distributed

    return distributed.global_state.client
