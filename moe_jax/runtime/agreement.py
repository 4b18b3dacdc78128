"""What every process of a run says, and whether all of them say the same."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.errors import Drift, UserError
from moe_jax.runtime import cluster

# The keys of what is said, which end with its name and the number of a process.
SAID = f"{cluster.ROOT}/same/"


def gather(name: str, values: Mapping[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Returns what every process of the run says, by its number; in a run of one, its own.

    To be called by all of them, once for each `name`.

    Args:
      name: of what is said, such as "config".
      values: JSON values of this process.
      timeout: seconds to wait for the others.

    Raises UserError when one of them does not say it in time.
    """
    # Through JSON, as the values of the others come.
    own = json.loads(json.dumps(dict(values)))
    if not cluster.PEERS.started:
        return [own]
    cluster.PEERS.set(f"{SAID}{name}/{jax.process_index()}", json.dumps(own))
    said = []
    # In the order of their numbers, so that the first one that is missing is named.
    for process in range(jax.process_count()):
        text = cluster.PEERS.wait_for(f"{SAID}{name}/{process}", timeout)
        if text is None:
            raise UserError(
                f"process {process} did not say its {name} within {timeout:.0f} s: look at its log"
            )
        said.append(json.loads(text))
    return said


def compare(name: str, values: Mapping[str, Any], timeout: float) -> None:
    """Compares a flat dict of JSON values with that of every other process of the run.

    Every process sees the same values, so all of them raise the same Drift. The arguments are those
    of `gather`. Raises Drift, which names the keys, both values and the process, and what `gather`
    raises.
    """
    first, *others = gather(name, values, timeout)
    differences = []
    for process, other in enumerate(others, 1):
        # A key may be there in one of them alone.
        for key in sorted({*first, *other}):
            here, there = first.get(key, "nothing"), other.get(key, "nothing")
            if here != there:
                differences.append(f"{key} = {here!r} in process 0, {there!r} in process {process}")
    if differences:
        raise Drift(
            f"the processes of this run differ in their {name}: {'; '.join(differences[:8])}. "
            "Start all of them with the same command, code and data"
        )
