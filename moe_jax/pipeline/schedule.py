"""When each stage of a pipeline computes what: plain arithmetic, the same for Python's integers and
for traced ones.

p stages, m micro-batches in groups of p, v chunks of layers a stage. Chunk c of stage s has the
layers of place c p + s, of v p places; a micro-batch goes round the ring of stages v times
(Narayanan et al. 2021, arXiv:2104.04473, section 2.2, the interleaved schedule; v = 1 is GPipe's,
Huang et al. 2019, arXiv:1811.06965). Each stage does the same list of m v forward works, one a
tick, stage s s ticks later than stage 0, and a list of as many backward works, the last stage
first. So what a stage is given was made by its neighbour in the tick before.

A work has a number k: its group is k // (p v), its chunk (k mod p v) // p, forward, and v - 1 less
that, backward, and its micro-batch the (k mod p)-th of the group.

    "gpipe"  all forward works, then all backward works, each m v + p - 1 ticks
    "1f1b"   a tick has a forward and a backward work once there is one: m v - (v - 1) p ticks of
             both, v p - 1 ticks of forward works alone before them and as many of backward works
             alone after them (PipeDream's order, Narayanan et al. 2019, arXiv:1806.03377)

In either of them the forward works take m v + p - 1 ticks of time, of which a stage works m v: the
bubble is (p - 1) / (m v + p - 1).
"""

from typing import Any, NamedTuple

from moe_jax.schema.config import Config

# The names of the schedules, as the config has them.
GPIPE = "gpipe"
ONE_F_ONE_B = "1f1b"


def of(cfg: Config) -> "Schedule":
    """Returns the sizes of the pipeline of a config; one stage is none."""
    return Schedule(cfg.mesh.stage, cfg.train.num_micro_batches, cfg.train.pipeline_chunks)


class Work(NamedTuple):
    """Holds one work of one stage; the fields are integers, traced or not."""

    # Whether there is one at all: else the other fields are those of some work.
    valid: Any
    chunk: Any
    # The number of the micro-batch is group * p + member.
    group: Any
    member: Any
    # Its number among the forward works of a stage.
    number: Any


class Phase(NamedTuple):
    """Holds a run of ticks in which every stage does the same kinds of works."""

    first: int
    ticks: int
    forward: bool
    backward: bool


class Schedule(NamedTuple):
    """Holds the sizes of a pipeline."""

    stages: int
    micro_batches: int
    chunks: int = 1

    @property
    def works(self) -> int:
        """Returns how many forward works a stage has, and backward ones."""
        return self.micro_batches * self.chunks

    @property
    def groups(self) -> int:
        """Returns how many micro-batches each stage takes through the ends of the model."""
        return self.micro_batches // self.stages

    @property
    def round(self) -> int:
        """Returns how many works a group of micro-batches is to a stage."""
        return self.stages * self.chunks

    @property
    def ticks(self) -> int:
        """Returns how long the works of one kind take, when no other kind is between them."""
        return self.works + self.stages - 1

    @property
    def bubble(self) -> float:
        """Returns the part of the time in which a stage has no work."""
        return 1 - self.works / self.ticks

    @property
    def in_flight(self) -> int:
        """Returns how many inputs of chunks a stage keeps at most under "1f1b"."""
        return min(2 * self.round - 1, self.works)

    def forward(self, tick: Any, stage: Any) -> Work:
        """Returns the forward work of a stage in a tick."""
        return self._work(tick - stage, backward=False)

    def backward(self, tick: Any, stage: Any) -> Work:
        """Returns the backward work of a stage in a tick.

        Tick 0 is that in which the last stage does its first one.
        """
        return self._work(tick - (self.stages - 1 - stage), backward=True)

    def phases(self, name: str) -> tuple[Phase, ...]:
        """Returns the ticks of the backward pass of a step.

        A tick t of a phase with backward works is number t - `first_backward` of `backward`.
        """
        if name == GPIPE:
            return (Phase(0, self.ticks, forward=False, backward=True),)
        # "1f1b": forward works alone, both, and backward works alone.
        alone = self.round - 1
        return (
            Phase(0, alone, forward=True, backward=False),
            Phase(alone, self.ticks - alone, forward=True, backward=True),
            Phase(self.ticks, alone, forward=False, backward=True),
        )

    def first_backward(self, name: str) -> int:
        """Returns the tick of the backward pass in which the last stage does its first backward
        work: under "1f1b" that in which it has done its forward work.
        """
        return 0 if name == GPIPE else self.round - 1

    def moved(self, name: str) -> int:
        """Returns how many micro-batches a stage receives in a step: of each forward work its input
        and one on its way to stage 0, of each backward work its cotangent and one on its way to the
        last stage, and of each pass what is finished.
        """
        # Under "1f1b" the backward pass has forward works of its own.
        forward_passes = 1 if name == GPIPE else 2
        return self.ticks * (2 * forward_passes + 2 + 2)

    def kept(self, name: str) -> int:
        """Returns of how many forward works a stage keeps the inputs."""
        return self.works if name == GPIPE else self.in_flight

    def _work(self, number: Any, backward: bool) -> Work:
        """Returns the work of a number; in the bubble there is none, and `valid` says so."""
        valid = (number >= 0) & (number < self.works)
        group, place = number // self.round, number % self.round
        chunk, member = place // self.stages, place % self.stages
        # Backward the last chunk comes first.
        if backward:
            chunk = self.chunks - 1 - chunk
        forward = group * self.round + chunk * self.stages + member
        return Work(valid, chunk, group, member, forward)
