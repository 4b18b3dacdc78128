"""FLOPs that a device does in a step, beside those that are useful, by part of the model.

What is done and not useful is recomputed (rematerialisation, accumulation), padded (capacity, worst
case) or masked (attention scores of keys that a token does not see).
"""

from typing import NamedTuple

from moe_jax.plan import flops
from moe_jax.plan.hlo.products import EXPERTS, JOINS, LATENT, OTHER, part_of
from moe_jax.plan.hlo.program import Program
from moe_jax.schema.config import Config


class Work(NamedTuple):
    """FLOPs of one part of the model, of one device in one step."""

    part: str
    useful: int
    done: int
    # The program does not say: `done` is what its buffers hold.
    is_estimate: bool = False


def compare(
    cfg: Config,
    program: Program,
    rows_held: float,
    rows_balanced: float,
    rows_computed: int | None = None,
) -> list[Work]:
    """Returns the work of every part, the most first.

    `rows_computed` are those of a balanced load with the padding of the experts' kernel (None = not
    known): what kernels say of all rows that they are given is scaled to them.

    A kernel may say nothing of its FLOPs, and a loop may be as long as the load asks for. A part
    that such a program seems to do less of than is useful then counts as useful, and the experts as
    all rows of the dispatch buffer.
    """
    useful, done = _useful(cfg), dict(program.products.flops)
    told = program.products.told[EXPERTS]
    if rows_computed is not None and told:
        # The kernel speaks of all rows of its buffer; with a balanced load it computes fewer.
        done[EXPERTS] += round(told * (rows_computed / rows_held - 1))
    least = dict(useful)
    if EXPERTS in useful:
        least[EXPERTS] = round(useful[EXPERTS] * rows_held / rows_balanced)
    not_counted = {part_of(scope) for scope in program.unknown_loops}
    not_counted |= program.products.unknown.keys()
    work = []
    for part in dict.fromkeys([*useful, *done]):
        counted = done.get(part, 0)
        # Less than is useful cannot be: some of it was not counted.
        is_unknown = part in not_counted or OTHER in not_counted
        is_estimate = is_unknown and counted < least.get(part, 0)
        told = least[part] if is_estimate else counted
        # Scaled to a load that nobody knows.
        is_estimate |= part == EXPERTS and rows_computed is not None
        work.append(Work(part, useful.get(part, 0), told, is_estimate))
    return sorted(work, key=lambda one: -one.done)


def _useful(cfg: Config) -> dict[str, int]:
    """Returns the useful FLOPs of a step on one device: forward, and twice that backward."""
    per_token = flops.forward_per_token(cfg.model, cfg.data.seq_len)
    num_tokens = cfg.train.batch_size * cfg.data.seq_len / cfg.mesh.num_devices
    by_part = {
        "attention projections": per_token.attention_projections,
        "attention scores": per_token.attention_scores,
        "dense and shared": per_token.dense + per_token.shared,
        EXPERTS: per_token.experts,
        "routers": per_token.router,
        "head": per_token.head,
        JOINS: per_token.joins,
        LATENT: per_token.latent,
    }
    return {part: round(3 * count * num_tokens) for part, count in by_part.items() if count}
