"""The process of one job: `python -m moe_jax.bench.worker`, started by workers.py.

It reads the job from the first line of its standard input, prepares it, and answers with its facts.
Each further line is an order to run once, answered with the seconds that it took. Answers are lines
of JSON on standard output; what libraries print goes to standard error.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from moe_jax.bench.contract import Job, Prepared
from moe_jax.errors import UserError
from moe_jax.runtime import memory


def main() -> int:
    # As in training, and of a rival, too.
    memory.keep()
    # Whatever is printed by others must not stand between the answers.
    # A copy of standard output for the answers; standard output itself goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job(**json.loads(sys.stdin.readline()))
    try:
        prepared = preparation(job.kind)(job)
    except UserError as error:
        _answer(answers, error=str(error))
        return error.code
    _answer(answers, facts=prepared.facts)
    for _ in sys.stdin:
        start = time.perf_counter()
        own_seconds = prepared.run()
        seconds = time.perf_counter() - start if own_seconds is None else own_seconds
        _answer(answers, seconds=seconds, memory=_most_memory())
    return 0


def preparation(kind: str) -> Callable[[Job], Prepared]:
    """Returns the function that prepares a kind of job.

    A process imports what its own job needs: jax and torch are never in one.
    """
    if kind.startswith("rival"):
        from moe_jax.bench import rivals

        return rivals.PREPARE[kind]
    if kind == "run":
        from moe_jax.bench import overheads

        return overheads.run
    from moe_jax.bench import ours

    return ours.PREPARE[kind]


def _answer(answers: TextIO, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")


def _most_memory() -> int:
    """Returns the most bytes that this process has had in memory."""
    # Linux counts it in units of 1024 bytes.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
