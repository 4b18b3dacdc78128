"""FLOPs of training with zeros in the experts, which count as nothing; what studies of sparse
weights compare by.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import config
from moe_jax.config import config_file
from moe_jax.plan import flops
from moe_jax.study.contract import Figures

EVERY = 20  # steps between two moves of the zeros, in the studies


def of_run(cfg: config.Config, figures: Figures) -> float:
    """Returns the training FLOPs of a run from the densities that it has noted."""
    return training_flops(cfg, figures.get("density_curve") or [(cfg.train.steps, 1.0)])


def active(cfg: config.Config, figures: Figures) -> float:
    """Returns the FLOPs of the forward pass of the trained model, per token."""
    parts = flops.forward_per_token(cfg.model, cfg.data.seq_len)
    return parts.total - parts.experts * (1 - figures.get("density", 1.0))


def stored(cfg: config.Config, figures: Figures) -> float:
    """Returns the MB of the weights: what is not zero, and a bit for each place of the experts."""
    counts = flops.parameters(cfg.model)
    values = 4 * (counts.total - counts.experts * (1 - figures.get("density", 1.0)))
    places = 0 if cfg.model.moe.sparse.dense else counts.experts / 8
    return (values + places) / 1e6


DERIVED = {"sparse_train_flops": of_run, "sparse_active_flops": active, "stored_MB": stored}


def training_flops(cfg: config.Config, curve: Sequence[tuple[int, float]]) -> float:
    """Of a whole run, from the experts' densities at some steps: what a zero weight would cost is
    left out.

    Forward and the gradient of activations need the weights that are not zero; the gradient of
    weights those that may move: under `threshold` all of them, for any may come back, and under
    `rigl` all of them in the steps that choose which come (Evci et al. 2020, arXiv:1911.11134,
    appendix H).
    """
    parts, options = (
        flops.forward_per_token(cfg.model, cfg.data.seq_len),
        cfg.model.moe.sparse.rule_options,
    )
    rule, rest = cfg.model.moe.sparse.rule, 3 * (parts.total - parts.experts)
    tokens, total, before = cfg.train.batch_size * cfg.data.seq_len, 0.0, 0
    most = max(density for _, density in curve) if rule in ("static", "set", "rigl") else 0.0
    for step, density in curve:  # of the steps since the last one
        density = max(density, most)  # weights that have just come are zero, and alive
        moving = {
            "threshold": 1.0,
            "rigl": density + (1 - density) / getattr(options, "every", 1),
        }.get(rule, density)
        if rule == "rigl" and step > options.end * cfg.train.steps:
            moving = density
        total += (step - before) * tokens * (rest + parts.experts * (2 * density + moving))
        before = step
    return total


def magnitude_curve(steps: int, density: float) -> list[tuple[int, float]]:
    """What `magnitude` does from step to step with its default beginning and end
    (moe_jax/moe/sparse/rules.py).
    """
    end, now, curve = round(0.5 * steps), 1.0, []
    for step in range(1, steps + 1):
        curve.append((step, now))  # the step computes with the mask from before
        if step <= end and (step % EVERY == 0 or step == end):
            now = density + (1 - density) * (1 - step / end) ** 3
    return curve


def magnitude_steps(base: Mapping[str, Any], sparse: Mapping[str, Any], budget: float) -> int:
    """Returns the most steps of `magnitude` that take no more FLOPs than `budget`."""
    cfg = config.build(config_file.read(Path("base"), {**base, **sparse}), 1)
    density = cfg.model.moe.sparse.pattern_options.density
    most = cfg.train.steps
    return max(
        n for n in range(50, most + 1) if training_flops(cfg, magnitude_curve(n, density)) <= budget
    )


def budget_of(base: Mapping[str, Any], arm: Mapping[str, Any]) -> float:
    """Returns the training FLOPs of an arm without zeros."""
    cfg = config.build(config_file.read(Path("base"), {**base, **arm}), 1)
    return training_flops(cfg, [(cfg.train.steps, 1.0)])
