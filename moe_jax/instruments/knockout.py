"""What each expert is worth: the held-out loss, per domain, without it.

    removed    its assignments go nowhere; the other gates of a token stay as they are
    around     its logit is masked, so that the next best expert takes its tokens (a router with a
               linear gate)

One compiled function serves every expert of every layer: the expert is data, a mask [B, M, E] of
the batch (moe/probe.py).

Shapes: L MoE layers, E experts, Z domains, B rows of a batch, R held-out rows, M blocks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.data.batches import PackedText
from moe_jax.errors import UserError
from moe_jax.instruments import bootstrap, held_out
from moe_jax.instruments.held_out import Run
from moe_jax.moe.probe import Request

PASSIVE = {"removed": "removed", "around": "routed around"}
# How an expert goes, and the field of the Request that asks for it.
WAYS = {"removed": "removed", "around": "barred"}


class Worth(NamedTuple):
    """Holds what the experts are worth, in bits per byte: `base_Z` with all experts, `change_LEZ`
    what the loss of an expert adds.

    `mean_LE` is the mean change over domains; `low` and `high` are the ends of 95 % intervals over
    held-out rows. NaN where no row is of a domain, and of an interval also where one row alone is.
    """

    base_Z: np.ndarray
    change_LEZ: np.ndarray
    low_LEZ: np.ndarray
    high_LEZ: np.ndarray
    mean_LE: np.ndarray
    mean_low_LE: np.ndarray
    mean_high_LE: np.ndarray
    # Of a domain's assignments.
    share_LEZ: np.ndarray
    # Of all assignments.
    load_LE: np.ndarray


class Rows(NamedTuple):
    """The bytes that each held-out row predicts, its domain, and the nats that it loses without
    each expert.
    """

    bytes_R: np.ndarray
    domain_R: np.ndarray
    nats_LER: np.ndarray


def measure(run: Run, way: str, seed: int = 0) -> Worth:
    """Returns what each expert is worth, after one evaluation per expert and layer.

    Args:
      way: a key of WAYS.
      seed: of the bootstrap.

    Raises UserError when the router cannot go round an expert.
    """
    num_experts = run.cfg.model.moe.num_experts
    sums_of = held_out.make_sums(run, run.cfg.model)
    base: list[Any] = []
    rows_of_batches: list[Rows] = []
    for number, batch in enumerate(run.batches):
        on_mesh = held_out.put_batch(run, batch)
        # Asked for with a request too, which removes nobody: both losses are of one program.
        nobody = on_mesh._replace(request=without(run, WAYS[way], 0, None))
        before = sums_of(run.params, run.router_state, nobody)
        after_LEB = _without_each(run, sums_of, on_mesh, way, number)
        base.append({name: before[name] for name in ("nll", "bytes", "routing")})
        rows_of_batches.append(_rows(run, batch, after_LEB - before["rows"]["nats"]))
    total = jax.tree.map(lambda *z: np.sum(z, 0), *base)
    columns = zip(*rows_of_batches, strict=True)
    rows = Rows(*(np.concatenate(column, -1) for column in columns))
    # From [L, Z, C], where the classes behind the experts are null experts.
    routing_LEZ = np.moveaxis(total["routing"][:, :, :num_experts], 1, 2)
    return worth(rows, total["nll"], total["bytes"], routing_LEZ, seed)


def worth(
    rows: Rows, nats_Z: np.ndarray, bytes_Z: np.ndarray, routing_LEZ: np.ndarray, seed: int
) -> Worth:
    """Returns the figures of all rows, from what each lost and from the sums with all experts."""
    # Bits per byte are nats / (log 2 * bytes). No bytes, no figure.
    num_domains = len(bytes_Z)
    divisor_Z = math.log(2) * np.where(bytes_Z > 0, bytes_Z, np.nan)
    divisor_R = math.log(2) * rows.bytes_R
    one_hot_RZ = rows.domain_R[:, None] == np.arange(num_domains)
    # [L, E, R] @ [R, Z]: the rows of each domain are added up.
    change_LEZ = (rows.nats_LER @ one_hot_RZ) / divisor_Z
    each, mean = bootstrap.ratios(rows.nats_LER, divisor_R, rows.domain_R, num_domains, seed)
    return Worth(
        base_Z=nats_Z / divisor_Z,
        change_LEZ=change_LEZ,
        low_LEZ=each.low,
        high_LEZ=each.high,
        mean_LE=np.nanmean(change_LEZ, -1),
        mean_low_LE=mean.low,
        mean_high_LE=mean.high,
        share_LEZ=_shares(routing_LEZ),
        load_LE=_shares(routing_LEZ.sum(2)),
    )


def _shares(counts_LE: np.ndarray) -> np.ndarray:
    """Returns counts as shares of their sum over experts, the second dimension."""
    return counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1)


def _rows(run: Run, batch: PackedText, nats_LEB: np.ndarray) -> Rows:
    """Returns the rows of all processes; bytes are those of the text, as the task counts them
    (tasks/lm).
    """
    whole, data = held_out.whole(batch, run.cfg.eval.batch_size), run.dataset
    # A held-out row is of one domain from end to end.
    domain_B = whole.domain_BS[:, 0]
    valid_BS = whole.segment_BS > 0
    token_bytes_BS = data.tokenizer.token_bytes()[whole.targets_BS] * valid_BS
    bytes_B = token_bytes_BS.sum(1) * data.byte_scale()[domain_B]
    return Rows(bytes_B, domain_B, nats_LEB)


def _without_each(
    run: Run, sums_of: Callable[..., Any], batch: PackedText, way: str, number: int
) -> np.ndarray:
    """Returns the nats [L, E, B] of each row of a batch without each expert."""
    cfg = run.cfg.model
    nats_LEB = np.zeros((cfg.num_moe_layers, cfg.moe.num_experts, run.cfg.eval.batch_size))
    for layer, expert in np.ndindex(cfg.num_moe_layers, cfg.moe.num_experts):
        batch_of = f"batch {number + 1} of {len(run.batches)}"
        run.tell(f"{way}, {batch_of}, expert {expert} of layer {layer}")
        asked = batch._replace(request=without(run, WAYS[way], layer, expert))
        sums = sums_of(run.params, run.router_state, asked)
        nats_LEB[layer, expert] = sums["rows"]["nats"]
        # A router that does not look at masked logits would give the loss of the whole model.
        if way == "around" and sums["routing"][layer, :, expert].any():
            raise UserError(
                f'model.moe.router = "{cfg.moe.router}" does not go round expert {expert} of layer '
                f"{layer}"
            )
    return nats_LEB


def without(run: Run, field: str, layer: int, expert: int | None) -> Request:
    """Returns the request that takes one expert of one MoE layer away, on every row; None: no
    expert.
    """
    cfg = run.cfg.model
    mask_LBE = np.zeros((cfg.num_moe_layers, run.cfg.eval.batch_size, cfg.moe.num_experts), bool)
    if expert is not None:
        mask_LBE[layer, :, expert] = True
    mask_BME = held_out.put_rows(run, held_out.of_all_blocks(cfg, mask_LBE))
    return Request()._replace(**{field: mask_BME})
