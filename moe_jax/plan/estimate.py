"""How long a step takes on a chip, from published figures: no more than an estimate.

Compute is FLOPs over the peak, memory is bytes over the bandwidth, and the network is the sum of
the collectives. A step is at least the longest of the three. It is expected to be the longer of
compute and memory, and what the device waits for: collectives that are not asynchronous.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from moe_jax.plan import network
from moe_jax.plan.chips import Chip
from moe_jax.plan.hlo.program import Program
from moe_jax.plan.work import Work
from moe_jax.schema.config import Config


class Estimate(NamedTuple):
    """Seconds of one step, and what they make."""

    compute: float
    memory: float
    # By mesh axes.
    network: Mapping[str, float]
    # Of the network, what nothing is computed meanwhile.
    waited: float
    tokens_per_step: int
    # Useful FLOPs over the published peak, at the expected time.
    useful_seconds: float

    @property
    def step(self) -> float:
        """Returns the expected seconds of a step."""
        longest = max(self.compute, self.memory, sum(self.network.values()))
        return max(longest, max(self.compute, self.memory) + self.waited)

    @property
    def bound(self) -> str:
        """Returns what takes the longest: "compute", "memory" or "network over AXES"."""
        parts = {"compute": self.compute, "memory": self.memory}
        total = sum(self.network.values())
        if total and total >= max(parts.values()):
            axes, _ = max(self.network.items(), key=lambda pair: pair[1])
            return f"network over {axes}"
        return max(parts, key=lambda name: parts[name])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step

    @property
    def mfu(self) -> float:
        """Returns the expected model FLOPs utilization."""
        return self.useful_seconds / self.step


def estimate(
    cfg: Config, program: Program, work: Sequence[Work], mesh: Mesh, chip: Chip
) -> Estimate:
    """Returns the times of a program on a chip."""
    peak = chip.peak[cfg.model.dtype]
    by_axes: dict[str, float] = {}
    waited = 0.0
    for collective in program.collectives:
        seconds = network.seconds(collective, mesh, chip)
        axes = collective.axes or "all"
        by_axes[axes] = by_axes.get(axes, 0.0) + seconds
        # An asynchronous one runs while something is computed.
        waited += 0.0 if collective.is_async else seconds
    return Estimate(
        compute=sum(one.done for one in work) / peak,
        memory=program.memory_traffic.total() / chip.memory_bandwidth,
        network=by_axes,
        waited=waited,
        tokens_per_step=cfg.train.batch_size * cfg.data.seq_len,
        useful_seconds=sum(one.useful for one in work) / peak,
    )
