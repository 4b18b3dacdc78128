"""How the time of a training step grows: with the number of experts, and with the tokens of a
batch; and how the time to compile it grows with the number of blocks.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_jax.bench import results, workers
from moe_jax.bench.contract import Job, Timing
from moe_jax.bench.session import Part, Session
from moe_jax.errors import UserError

EXPERTS = (8, 16, 32, 64, 128, 256)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
# Repeats of the period, all of them one lax.scan.
DEPTHS = (4, 24)


class Curve(NamedTuple):
    """Holds the time of a step against one size."""

    # What is on the axis: "experts" or "tokens".
    size: str
    # The timing for each size, and of the variant as it is, in the same rounds.
    timings: dict[int, tuple[Timing, Timing]]

    def ratios(self) -> dict[int, float]:
        """Returns the time for each size over that of the variant as it is."""
        return {n: results.ratio(timing, base) for n, (timing, base) in self.timings.items()}


def scaling(session: Session) -> Part:
    """Times the first variant that has experts, with other numbers of experts and of tokens.

    Each is timed in rounds with the variant as it is. So there are two processes at a time, however
    many sizes there are: the largest of them fill the memory.
    """
    variants = session.variants.values()
    with_experts = [(job, cfg) for job, cfg in variants if cfg.model.num_moe_layers]
    if not with_experts:
        raise UserError("--what scaling: no variant has a mixture of experts")
    base, cfg = with_experts[0]
    curves = []
    for size, values in (("experts", EXPERTS), ("tokens", TOKENS)):
        timings = {}
        for n in values:
            change = f"--config.model.moe.num_experts={n}"
            if size == "tokens":
                # The tokens of a batch are its rows times their length; at least one row.
                change = f"--config.train.batch_size={max(n // cfg.data.seq_len, 1)}"
            job = base._replace(name=f"{n} {size}", changes=(*base.changes, change))
            timed = session.interleave([base, job])
            timings[n] = timed[job.name], timed[base.name]
        curves.append(Curve(size, timings))
    return {"scaling": curves}, [results.scaling(*curve, base.name) for curve in curves]


def depth(session: Session) -> Part:
    """Compiles the step of the first variant for several depths under scan."""
    job, cfg = session.first()
    seconds: dict[int, list[float]] = {n: [] for n in DEPTHS}
    # A compilation takes long, and the shortest of a few says enough.
    for _ in range(min(session.rounds, 3)):
        for n in DEPTHS:
            changes = (*job.changes, "--config.model.scan=True", f"--config.model.repeats={n}")
            # Without the cache of compiled programs, which would make the second round a look-up.
            compilation = Job(f"{n} repeats", "compilation", job.config, changes, {"cache": ""})
            session.tell(f"compiling {n} repeats")
            worker = workers.Worker(compilation)
            worker.close()
            seconds[n].append(worker.facts["trace"] + worker.facts["compile"])
    shortest = {n: min(values) for n, values in seconds.items()}
    num_blocks = {n: n * len(cfg.model.period) for n in DEPTHS}
    return {"depth": shortest}, [results.depth(shortest, num_blocks, job.name)]


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Writes a plot with a panel for each curve, both axes logarithmic."""
    # Imported here: it takes a second, and other measurements draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for ax, curve in zip(figure.subplots(1, len(curves)), curves, strict=True):
        ratios = curve.ratios()
        sizes = sorted(ratios)
        ax.plot(sizes, [ratios[n] for n in sizes], marker="o", color="tab:blue", label="measured")
        # What a cost that is proportional to the size would be, through the first point.
        proportional = [ratios[sizes[0]] * n / sizes[0] for n in sizes]
        ax.plot(sizes, proportional, color="0.6", linestyle="--", label="proportional")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(sizes, [str(n) for n in sizes])
        lowest = math.floor(math.log2(min(ratios.values())))
        highest = math.ceil(math.log2(max(ratios.values())))
        ticks = [2.0**exponent for exponent in range(lowest, highest + 1)]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel(curve.size)
        ax.set_ylabel("time of a step / as it is")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    figure.savefig(path)
