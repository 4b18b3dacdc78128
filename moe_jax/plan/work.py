"""FLOPs that a device does in a step, beside those that are useful, by part of the model.

What is done and not useful is recomputed (rematerialisation, accumulation), padded (capacity, worst
case) or masked (attention scores of keys that a token does not see).
"""

from typing import NamedTuple

from moe_jax.plan import flops
from moe_jax.plan.hlo.program import Program
from moe_jax.schema.config import Config

EXPERTS = "routed experts"


class Work(NamedTuple):
    """FLOPs of one part of the model, of one device in one step."""

    part: str
    useful: int
    done: int
    # The program does not say: `done` is what its buffers hold.
    is_estimate: bool = False


def compare(cfg: Config, program: Program, rows_held: float, rows_balanced: float) -> list[Work]:
    """Returns the work of every part, the most first.

    A kernel that says nothing of its FLOPs, or a loop whose length depends on the load, is that of
    the experts: they count as all rows of the buffer, as often as the compiled program would have
    to compute them.
    """
    useful = _useful(cfg)
    done = dict(program.products.flops)
    unknown = bool(program.products.unknown) or any(
        "experts" in scope for scope in program.unknown_loops
    )
    if unknown and useful.get(EXPERTS):
        padded = round(useful[EXPERTS] * rows_held / rows_balanced)
        done[EXPERTS] = max(done.get(EXPERTS, 0), padded)
    parts = dict.fromkeys([*useful, *done])
    work = [
        Work(part, useful.get(part, 0), done.get(part, 0), unknown and part == EXPERTS)
        for part in parts
    ]
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
    }
    return {part: round(3 * count * num_tokens) for part, count in by_part.items() if count}
