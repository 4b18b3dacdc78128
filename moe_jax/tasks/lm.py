"""Language modelling: next-token prediction over packed documents.

A task returns *sums* (`totals`), never means, so that micro-batches and devices add up; `objective` is the only place that divides.
Shapes: B rows, S sequence, V vocabulary, L MoE layers, E experts, Z domains.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.mesh import P
from moe_jax.models import depth
from moe_jax.moe import load, losses, probe
from moe_jax.moe.layer import Batch as ModelBatch


class Inputs(NamedTuple):
    """A batch (arrays or their specs), all int32 and sharded over rows; segment 0 and target 0 where there is padding."""

    tokens_BS: Any
    targets_BS: Any
    segment_BS: Any
    position_BS: Any
    domain_BS: Any
    row_B: Any
    # What instruments tell the MoE layers, for all M blocks of the model (moe/probe.py); () = nothing.
    recorded: Any = ()  # (experts, gates) [B, M, S, K] of a recording
    removed_BME: Any = ()  # experts whose assignments go nowhere
    barred_BME: Any = ()  # experts that the router must go round


def _seen(batch: Inputs, record: Mapping[str, Any]) -> ModelBatch:
    by_block = lambda tree: jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), tree)
    recorded, removed, barred = (by_block(z) for z in (batch.recorded, batch.removed_BME, batch.barred_BME))
    seen = (batch.tokens_BS, batch.position_BS, batch.segment_BS, batch.row_B)
    return ModelBatch(*seen, recorded, removed, barred, record or ())


def _apply(model: Callable, batch: Inputs, rng: jax.Array, train: bool):
    logits_BSV, sums = model(_seen(batch, {}), rng, train)
    return logits_BSV, negative_log_likelihood(logits_BSV, batch.targets_BS), batch.segment_BS > 0, sums


def negative_log_likelihood(logits_BSV: jax.Array, target_BS: jax.Array) -> jax.Array:
    """-log p(target) in nats, [B, S]. Written so that a vocabulary split over `model` is reduced, never gathered."""
    place = jax.typeof(logits_BSV).sharding
    hit_BSV = jax.lax.broadcasted_iota(jnp.int32, logits_BSV.shape, 2, out_sharding=place) == target_BS[:, :, None]
    return jax.nn.logsumexp(logits_BSV, -1) - jnp.where(hit_BSV, logits_BSV, 0).sum(-1)


def forward(model: Callable, batch: Inputs, rng: jax.Array) -> dict[str, Any]:
    """Training sums of a (micro-)batch: nll (nats), tokens, and the layers' totals [L, ...], `moe` and `depth`."""
    _, nll_BS, valid_BS, sums = _apply(model, batch, rng, True)
    return {
        "nll": jnp.where(valid_BS, nll_BS, 0).sum(),
        "tokens": valid_BS.sum().astype(nll_BS.dtype),
        "moe": load.totals(depth.without(sums)),
        "depth": depth.totals(sums),
    }


def objective(totals: Mapping[str, Any], coefficients: Mapping[str, float]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that is differentiated: nats per token plus the router's auxiliary losses; and its parts."""
    nll = totals["nll"] / jnp.maximum(totals["tokens"], 1)
    loss, parts = nll, {"nll": nll, **depth.figures(totals["depth"])}
    if totals["depth"]:
        loss = loss + depth.penalty(totals["depth"]).astype(nll.dtype)
    if totals["moe"]:
        extra, values = losses.auxiliary(totals["moe"], coefficients)
        loss, parts = loss + extra.astype(nll.dtype), parts | {f"{name}_loss": value for name, value in values.items()}
    return loss, parts


def record(model: Callable, batch: Inputs, rng: jax.Array, train: bool, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The routing of each token, {"expert", "gate", "dropped": [L, B, S, K]}, as `wanted` says: probe.ROUTING or probe.INPUTS."""
    return probe.split(model(_seen(batch, wanted), rng, train)[1])[1]


def evaluate(model: Callable, batch: Inputs, bytes_V: jax.Array, num_domains: int) -> dict[str, Any]:
    """Held-out sums per domain [Z]: nll (nats), tokens, correct (greedy), text bytes predicted; and the `moe` totals.

    `routing` counts assignments per MoE layer, domain and expert [L, Z, E]; held-out rows are of one domain each.
    """
    logits_BSV, nll_BS, valid_BS, sums = _apply(model, batch, jax.random.key(0), False)
    best_BS = jnp.argmax(logits_BSV, -1)
    domain_BSZ = (batch.domain_BS[:, :, None] == jnp.arange(num_domains)[None, None]) & valid_BS[:, :, None]
    per_domain = lambda x_BS: jnp.where(domain_BSZ, x_BS.astype(nll_BS.dtype)[:, :, None], 0).sum((0, 1))
    text_BS = bytes_V.at[batch.targets_BS].get(out_sharding=jax.typeof(batch.targets_BS).sharding)
    return {
        "nll": per_domain(nll_BS),
        "tokens": per_domain(valid_BS),
        "correct": per_domain(best_BS == batch.targets_BS),
        "bytes": per_domain(text_BS),
        "moe": load.totals(depth.without(sums)),
        "depth": depth.totals(sums),
        "routing": routing_by_domain(depth.without(sums), batch.domain_BS[:, 0], num_domains),
    }


def routing_by_domain(sums: Mapping[str, jax.Array], domain_B: jax.Array, num_domains: int) -> jax.Array:
    if not sums:
        return jnp.zeros((0, num_domains, 1))
    domain_BZ = (domain_B[:, None] == jnp.arange(num_domains)[None]).astype(sums["counts"].dtype)
    return jnp.einsum("LBE,BZ->LZE", sums["counts"], domain_BZ, out_sharding=P())
