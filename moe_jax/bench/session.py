"""A session of the bench: the variants that are timed, and what every part of it is told."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import config
from moe_jax.bench import rivals, workers
from moe_jax.bench.contract import Job, Timing
from moe_jax.terminal.table import Table
from moe_jax.terminal.working import Tell

OURS = "jax"
THEIRS = "torch"
# What a part has measured, by the names that it has in the JSON, and its tables.
Part = tuple[dict[str, Any], list[Table]]


class Session(NamedTuple):
    """Holds what every part is told."""

    # The training job and the config of each variant, by name.
    variants: Mapping[str, tuple[Job, config.Config]]
    rounds: int
    # Whether transformers is timed, too.
    rivals: bool
    tell: Tell

    def interleave(self, jobs: Sequence[Job]) -> dict[str, Timing]:
        """Returns the timing of each job by its name."""
        return workers.interleave(jobs, self.rounds, self.tell)

    def first(self) -> tuple[Job, config.Config]:
        """Returns the training job and the config of the first variant."""
        return next(iter(self.variants.values()))


def rival_jobs(kind: str, session: Session, options: Mapping[str, Any]) -> dict[str, Job]:
    """Returns the rival of each variant that has one: the fastest of its ways to compute experts,
    by a few runs of each. Variants of the same shapes share theirs. None without --rivals.
    """
    chosen: dict[str, Job] = {}
    of_shapes: dict[str, Job] = {}
    if not session.rivals:
        return chosen
    for name, (job, cfg) in session.variants.items():
        if rivals.why_none(cfg):
            continue
        shapes = rivals.shapes(cfg)
        if shapes in of_shapes:
            chosen[name] = of_shapes[shapes]
            continue
        jobs = []
        for way in rivals.implementations(cfg, kind):
            told = {**options, "experts": way}
            jobs.append(job._replace(name=f"{name} rival, {way}", kind=kind, options=told))
        chosen[name] = of_shapes[shapes] = workers.fastest(jobs, session.tell)
    return chosen
