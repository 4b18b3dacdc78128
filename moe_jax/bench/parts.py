"""The parts of the bench that every variant takes part in: training, decoding, the MoE layer, the
start.
"""

from collections.abc import Mapping

from moe_jax.bench import results, rivals, startup
from moe_jax.bench.contract import Job, Timing
from moe_jax.bench.session import OURS, THEIRS, Part, Session, rival_jobs
from moe_jax.errors import UserError
from moe_jax.models.decodable import why_not_decoded

# Of decoding: rows, tokens of a prompt, tokens drawn for each row.
BATCHES = (1, 8, 32)
PROMPT = 32
NEW = 128
# Of the start, which is timed in fewer rounds: each takes half a minute.
STARTS = 3
# How the jobs begin that measure the peak.
PEAK = "product "


def products(session: Session) -> list[Job]:
    """Returns the jobs that measure the peak in the rounds of a part."""
    jobs = []
    # A peak for each dtype that a variant computes in.
    for dtype in dict.fromkeys(cfg.model.dtype for _, cfg in session.variants.values()):
        options = {"dtype": dtype}
        jobs.append(Job(f"{PEAK}{OURS}, {dtype}", "product", options=options))
        if session.rivals and dtype in rivals.DTYPES:
            jobs.append(Job(f"{PEAK}{THEIRS}, {dtype}", "rival_product", options=options))
    return jobs


def train(session: Session) -> Part:
    """Times training steps."""
    jobs = {name: job for name, (job, _) in session.variants.items()}
    against = rival_jobs("rival_train", session, {})
    # All of them in every round: products of matrices, variants and rivals.
    timings = session.interleave([*products(session), *jobs.values(), *_once(against)])
    rows = []
    for name, job in jobs.items():
        theirs = _timing(timings, against.get(name))
        rows.append(results.Row(name, timings[job.name], theirs))
    peaks = _peaks(timings)
    of_dtypes = {
        cfg.model.dtype: peaks[f"{OURS}, {cfg.model.dtype}"] for _, cfg in session.variants.values()
    }
    tables = [results.peaks(peaks), results.training(rows, of_dtypes)]
    return {"peak": peaks, "training": rows}, tables


def decode(session: Session) -> Part:
    """Times greedy decoding of each variant and number of rows.

    The numbers of rows are timed one after another, variants and rivals within one interleaved.
    """
    rows = []
    for size in BATCHES:
        options = {"batch": size, "prompt": PROMPT, "new": NEW}
        jobs = {}
        for name, (job, cfg) in session.variants.items():
            # A model that cannot be decoded is left out.
            if not why_not_decoded(cfg.model):
                title = f"{name}, {size} rows"
                jobs[name] = job._replace(name=title, kind="decode", options=options)
        against = rival_jobs("rival_decode", session, options)
        timings = session.interleave([*jobs.values(), *_once(against)])
        for name, job in jobs.items():
            theirs = _timing(timings, against.get(name))
            rows.append(results.Row(job.name, timings[job.name], theirs))
    title = f"Decoding, greedy, {PROMPT} tokens of prompt and {NEW} new ones, prefill included"
    return {"decoding": rows}, [results.decoding(rows, title)]


def layer(session: Session) -> Part:
    """Times the MoE layer with a balanced and a collapsed router."""
    with_experts = [job for job, cfg in session.variants.values() if cfg.model.num_moe_layers]
    if not with_experts:
        raise UserError("--what layer: no variant has a mixture of experts")
    jobs = []
    for job in with_experts:
        for name, collapsed in (("balanced", False), ("collapsed", True)):
            options = {"collapsed": collapsed}
            jobs.append(job._replace(name=f"{job.name}, {name}", kind="layer", options=options))
    timings = session.interleave(jobs)
    return {"layer": timings}, [results.layers(timings, [job.name for job in with_experts])]


def start(session: Session) -> Part:
    """Times the start of a process, with the step of the first variant."""
    job, _ = session.first()
    seconds = startup.measure(job, min(STARTS, session.rounds), session.tell)
    return {"start": seconds}, [results.start(seconds, job.name)]


def _once(jobs: Mapping[str, Job]) -> list[Job]:
    """Returns each of some jobs once."""
    # Several variants may have the same rival.
    return list({job.name: job for job in jobs.values()}.values())


def _timing(timings: Mapping[str, Timing], job: Job | None) -> Timing | None:
    """Returns the timing of a job; None of none."""
    return timings[job.name] if job else None


def _peaks(timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """Returns the matrix products among some timings, by library and dtype."""
    return {
        name.removeprefix(PEAK): timing for name, timing in timings.items() if name.startswith(PEAK)
    }
