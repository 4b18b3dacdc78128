"""Times a config: training steps of its variants, decoding, the skew of the MoE layer, the start;
beside the peak of this machine and, with --rivals, beside Hugging Face transformers.

    python -m moe_jax bench --config bench:e8 --rounds 15 --variant e8: \
        --variant "e64 capacity: --config.model.moe.num_experts=64 \
        --config.model.moe.dispatcher=capacity"
    python -m moe_jax bench --config bench:e8 --what decode --rivals --out now.json

Keys that are changed outside of a variant are changed in all. Without --variant a config file that
has variants of its own is timed with all of them.

Every row has a process of its own. In every round each of them runs once, in turn, so that a
machine that changes its speed changes it for all. Reported are medians; ratios are medians over
rounds of the ratio within a round.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax import config
from moe_jax.bench import results, rivals, startup, workers
from moe_jax.bench.contract import Job, Timing
from moe_jax.config import command_line, config_file
from moe_jax.errors import UserError
from moe_jax.models.decodable import why_not_decoded
from moe_jax.parallel.mesh import AXES
from moe_jax.runtime import shell
from moe_jax.terminal import working
from moe_jax.terminal.table import Table
from moe_jax.terminal.working import Tell

PARTS = ("train", "decode", "layer", "start")
# Losses of the first step of both models may differ by so much: weights are drawn differently.
LOSSES = 0.3
# Of decoding: rows, tokens of a prompt, tokens drawn for each row.
BATCHES = (1, 8, 32)
PROMPT = 32
NEW = 128
# Of the start, which is timed in fewer rounds: each takes half a minute.
STARTS = 3
OURS = "jax"
THEIRS = "torch"


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


# What a part has measured, by the names that it has in the JSON, and its tables.
Part = tuple[dict[str, Any], list[Table]]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--variant",
        action="append",
        help="'NAME: --config.KEY=VALUE --config.KEY=VALUE'; the first is the reference (default: "
        "the variants of the config file, else the config as it is)",
    )
    parser.add_argument(
        "--what",
        action="append",
        choices=PARTS,
        help="a part to run, may be given several times (default: train)",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="times that each row is timed (default 15)"
    )
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="time transformers in the same rounds (pip install 'moe_jax[hf]')",
    )
    parser.add_argument("--out", type=Path, help="write every time of every round here, as JSON")
    parser.add_argument("--against", type=Path, help="compare with a file of --out")
    args = command_line.parse(parser, argv)
    args.what = args.what or ["train"]
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: at least 1")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    # Whatever can be wrong is said before the first process is started.
    before = results.read(args.against) if args.against else None
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: {args.out.parent} is no directory")
    variants = read_variants(args)
    if args.rivals:
        refuse_without_rival(variants)
    parts: dict[str, Any] = {"machine": results.machine()}
    tables: list[Table] = []
    with working.shown("bench") as tell:
        session = Session(variants, args.rounds, args.rivals, tell)
        for name, run in PART.items():
            if name in args.what:
                measured, shown = run(session)
                parts |= measured
                tables += shown
    console = shell.console()
    for table in tables:
        console.print(table)
    now = results.plain(parts)
    if args.out:
        args.out.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    if before:
        console.print(results.against(now, before, args.against.name))
    return 1 if unlike(parts) else 0


def read_variants(args: argparse.Namespace) -> dict[str, tuple[Job, config.Config]]:
    """Returns the training job and the config of each variant, by name.

    Raises UserError for one that the rules refuse: all of them, before the first is compiled.
    """
    named = [command_line.named(text, "--variant") for text in args.variant or []]
    described = [(name, str(args.config), tuple(changes)) for name, changes in named]
    if not described:
        own = config_file.variants(args.config)
        described = [(name, f"{args.config}:{name}", ()) for name in own]
    if not described:
        described = [(args.config.stem, str(args.config), ())]
    variants = {}
    for name, file, changes in described:
        try:
            raw = command_line.read(Path(file), [*args.changes, *changes])
            # Of the devices only a worker knows: this process leaves them alone.
            cfg = config.build(raw, raw["simulate_devices"] or _fewest_devices(raw["mesh"]))
        except UserError as error:
            text = f"--variant {name}: {error}" if changes else str(error)
            raise UserError(text) from None
        variants[name] = Job(name, "train", file, (*args.changes, *changes)), cfg
    return variants


def _fewest_devices(lengths: Mapping[str, Any]) -> int:
    """Returns how many devices a mesh needs where `-1` stands for one."""
    return math.prod(abs(length) for name, length in lengths.items() if name in AXES)


def refuse_without_rival(variants: Mapping[str, tuple[Job, config.Config]]) -> None:
    """Raises UserError where no variant can be built in transformers, or it is not installed."""
    try:
        import torch
        import transformers

        del torch, transformers
    except ImportError as error:
        raise UserError(f"--rivals needs {error.name}: pip install 'moe_jax[hf]' torch") from None
    reasons = {name: rivals.why_none(cfg) for name, (_, cfg) in variants.items()}
    if all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise UserError(f"--rivals: {name!r} has none, for {reason}")


def products(session: Session) -> list[Job]:
    """Returns the jobs that measure the peak in the rounds of a part."""
    jobs = [Job(f"product {OURS}", "product")]
    if session.rivals:
        jobs.append(Job(f"product {THEIRS}", "rival_product"))
    return jobs


def train(session: Session) -> Part:
    """Times training steps."""
    jobs = {name: job for name, (job, _) in session.variants.items()}
    against = rival_jobs("rival_train", session, {})
    timings = session.interleave([*products(session), *jobs.values(), *_once(against)])
    rows = [
        results.Row(name, timings[job.name], _timing(timings, against.get(name)))
        for name, job in jobs.items()
    ]
    peaks = _peaks(timings)
    tables = [results.peaks(peaks), results.training(rows, peaks[OURS])]
    return {"peak": peaks, "training": rows}, tables


def decode(session: Session) -> Part:
    """Times greedy decoding of each variant and number of rows.

    The numbers of rows are timed one after another, variants and rivals within one interleaved.
    """
    rows = []
    for size in BATCHES:
        options = {"batch": size, "prompt": PROMPT, "new": NEW}
        jobs = {
            name: job._replace(name=f"{name}, {size} rows", kind="decode", options=options)
            for name, (job, cfg) in session.variants.items()
            if not why_not_decoded(cfg.model)
        }
        against = rival_jobs("rival_decode", session, options)
        timings = session.interleave([*jobs.values(), *_once(against)])
        rows += [
            results.Row(job.name, timings[job.name], _timing(timings, against.get(name)))
            for name, job in jobs.items()
        ]
    title = f"Decoding, greedy, {PROMPT} tokens of prompt and {NEW} new ones, prefill included"
    return {"decoding": rows}, [results.decoding(rows, title)]


def layer(session: Session) -> Part:
    """Times the MoE layer with a balanced and a collapsed router."""
    with_experts = [job for job, cfg in session.variants.values() if cfg.model.num_moe_layers]
    if not with_experts:
        raise UserError("--what layer: no variant has a mixture of experts")
    jobs = [
        job._replace(name=f"{job.name}, {name}", kind="layer", options={"collapsed": collapsed})
        for job in with_experts
        for name, collapsed in (("balanced", False), ("collapsed", True))
    ]
    timings = session.interleave(jobs)
    return {"layer": timings}, [results.layers(timings, [job.name for job in with_experts])]


def start(session: Session) -> Part:
    """Times the start of a process, with the step of the first variant."""
    job, _ = next(iter(session.variants.values()))
    seconds = startup.measure(job, min(STARTS, session.rounds), session.tell)
    return {"start": seconds}, [results.start(seconds, job.name)]


PART = {"train": train, "decode": decode, "layer": layer, "start": start}


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


def unlike(parts: Mapping[str, Any]) -> bool:
    """Says of which rows the first losses differ, and returns whether there are any: then the two
    models are not alike, and neither are their times.
    """
    rows: Sequence[results.Row] = parts.get("training", [])
    far = []
    for row in rows:
        if row.rival and not math.isclose(
            row.timing.facts["loss"], row.rival.facts["loss"], abs_tol=LOSSES
        ):
            far.append(row.name)
    for name in far:
        shell.tell(
            f"error: {name}: the losses of the first step differ by more than {LOSSES}: the "
            "models are not alike",
            sys.stderr,
        )
    return bool(far)


def _once(jobs: Mapping[str, Job]) -> list[Job]:
    """Returns each of some jobs once."""
    return list({job.name: job for job in jobs.values()}.values())


def _timing(timings: Mapping[str, Timing], job: Job | None) -> Timing | None:
    """Returns the timing of a job; None of none."""
    return timings[job.name] if job else None


def _peaks(timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """Returns the matrix products among some timings, by library."""
    return {
        library: timings[f"product {library}"]
        for library in (OURS, THEIRS)
        if f"product {library}" in timings
    }
