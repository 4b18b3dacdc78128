"""What a run is, in a few aligned lines: the first thing that it prints.

The lines that need nothing but the config come at once; those of the data and of the start follow
when they are known.
"""

import math
import textwrap
from collections.abc import Sequence

import jax

from moe_jax.data.contract import Data
from moe_jax.parallel import chip_flags
from moe_jax.parallel.mesh import of
from moe_jax.plan import dispatch, flops
from moe_jax.schema.config import Config
from moe_jax.terminal.progress import Progress
from moe_jax.terminal.units import readable
from moe_jax.version import Source, source

# Columns before the text of a line.
LABEL = 9


def show(progress: Progress, cfg: Config, workdir: object, name: str) -> None:
    """Prints what is known before anything is opened.

    `name` is that of the config, as in "configs/vision.py:mnist".
    """
    lines = {
        "run": run(name, source()),
        "model": model(cfg),
        "devices": devices(),
        "flags": flags(cfg),
        "length": length(cfg),
        "buffer": dispatch.buffer_note(cfg) if cfg.model.num_moe_layers else "",
        "workdir": str(workdir),
    }
    for label, text in lines.items():
        line(progress, label, text)


def show_data(progress: Progress, data: Data) -> None:
    """Prints what the data are, when they are open."""
    line(progress, "data", rows(data, _width(progress)))


def show_start(progress: Progress, cfg: Config, step: int) -> None:
    """Prints where the run begins, when that is known."""
    line(progress, "start", start(cfg, step))


def line(progress: Progress, label: str, text: str) -> None:
    """Prints one line, wrapped under its own text where it is longer than the terminal is wide;
    nothing for no text.
    """
    # The label stands before the first line alone.
    for i, part in enumerate(wrapped(text, _width(progress))):
        progress.message(f"{label if i == 0 else '':{LABEL}}{part}")


def wrapped(text: str, width: int) -> list[str]:
    """Returns a text in parts of at most `width` columns.

    A path is never cut, for it is there to be copied.
    """
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _width(progress: Progress) -> int:
    """Returns the columns of the text of a line; a terminal may be narrower than any text."""
    # Processes that show nothing have no console.
    return max((progress.console.width if progress.console else 80) - LABEL, 20)


def run(name: str, code: Source) -> str:
    """Returns the config, the version, and the commit that the code is of."""
    config = f"{name}, " if name else ""
    commit = f", commit {code.commit[:9]}" if code.commit else ""
    changes = " with changes" if code.dirty else ""
    return f"{config}moe_jax {code.version}{commit}{changes}"


def model(cfg: Config) -> str:
    """Returns the kind of model, its layers and its parameters."""
    model, counts = cfg.model, flops.parameters(cfg.model)
    layers = []
    if model.num_moe_layers:
        name = "MoE layer" if model.num_moe_layers == 1 else "MoE layers"
        experts = f"{model.moe.num_experts} ({model.moe.router})"
        layers.append(f"{model.num_moe_layers} {name} of {experts}")
    if model.num_dense_layers:
        layers.append(f"{model.num_dense_layers} dense")
    blocks = f": {', '.join(layers)}" if layers else ""
    total, active = readable(counts.total), readable(counts.active)
    return f"{model.kind}{blocks}; {total} parameters, {active} active"


def devices() -> str:
    """Returns the devices of the mesh that is set, and what it splits."""
    mesh = jax.sharding.get_mesh()
    kind, number = mesh.devices.flat[0].device_kind, mesh.devices.size
    processes = jax.process_count()
    of_processes = f" of {processes} processes" if processes > 1 else ""
    axes = of(mesh).split()
    split = f", mesh {axes}" if axes else ""
    return f"{number} x {kind}{of_processes}{split}"


def flags(cfg: Config) -> str:
    """Returns the flags of XLA for this kind of chip; "" where there are none."""
    return chip_flags.text(chip_flags.of(jax.sharding.get_mesh(), cfg.chip_flags))


def length(cfg: Config) -> str:
    """Returns how many steps of how many tokens the run makes."""
    train, seq_len = cfg.train, cfg.data.seq_len
    micro = f" in {train.num_micro_batches} micro-batches" if train.num_micro_batches > 1 else ""
    tokens = train.steps * train.batch_size * seq_len
    end = f", stopping at {train.stop_at}" if 0 < train.stop_at < train.steps else ""
    batch = f"{train.batch_size} rows x {seq_len} tokens{micro}"
    return f"{train.steps:,} steps of {batch}, {readable(tokens)} tokens in all{end}"


def rows(data: Data, width: int) -> str:
    """Returns the name of the data, its rows, and its domains: as many as there is room for."""
    train, heldout = sum(data.sizes("train")), sum(data.sizes("heldout"))
    tokens = readable(train * data.seq_len)
    text = f"{data.name()}: {train:,} rows ({tokens} tokens), {heldout:,} held out"
    if len(data.domains) < 2:
        return text
    # Names may only fill the line that is there: a run of a hundred domains has no banner of them.
    counts = range(1, len(data.domains) + 1)
    most = max((n for n in counts if _fits(text, data.domains, n, width)), default=0)
    return f"{text}{_listed(data.domains, most)}"


def _fits(text: str, names: Sequence[str], number: int, width: int) -> bool:
    """Returns whether `number` of the names fit behind a text without a line more."""
    whole = f"{text}{_listed(names, number)}"
    # As many lines with the names as without them.
    return math.ceil(len(whole) / width) <= math.ceil(len(text) / width)


def _listed(names: Sequence[str], number: int) -> str:
    """Returns the first `number` of the names and how many more there are; for 0, how many there
    are.
    """
    if not number:
        return f", {len(names)} domains"
    more = f" and {len(names) - number} more" if number < len(names) else ""
    return f"; {', '.join(names[:number])}{more}"


def start(cfg: Config, step: int) -> str:
    """Returns where the run begins, and with which parameters."""
    if step:
        return f"going on from step {step}"
    if cfg.train.init_from:
        return f"step 0, with the parameters of {cfg.train.init_from}"
    return f"step 0, with fresh parameters (seed {cfg.seed})"
