"""How many routing decisions hang on rounding: the share of chosen experts that change with
precision and with batch composition.

    router     the router's logits in bfloat16 (its activations, weights and logits rounded), on
               the same activations
    model      the whole model in bfloat16, its router in float32 as always
    order      the same rows in reverse order
    size       the same rows in batches of half the size

A decision is one (token, choice); it flips if the expert is not among the token's experts any more.
For a router that decides token by token "order" and "size" are 0 up to rounding: a matrix product
of another shape may sum in another order.

The margin of a token is the k-th largest of the scores that decide minus the next: what a
perturbation must reach to flip a decision. They are the logits, and affinities plus bias for the
routers `sigmoid` and `quantile`, unless those choose groups first.

Shapes: L MoE layers, B rows, S sequence, K choices, E experts, D model, T tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batches import PackedText
from moe_jax.errors import UserError
from moe_jax.instruments import held_out
from moe_jax.instruments.held_out import Run
from moe_jax.moe import probe
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import RouterCfg, Routing, Tokens

# (params, router state, batch) -> its record.
Record = Callable[..., held_out.Arrays]
QUANTILES = (0.01, 0.1, 0.5, 0.9)


def measure(run: Run) -> dict[str, Any]:
    """Returns {"flips": {kind: [L]}, "margins": {quantile: [L]}, "notes": {kind: why it is
    missing}}, means over valid decisions.
    """
    cfg = run.cfg.model
    record_of = held_out.make_record(cfg, probe.INPUTS)
    # Routers compute in float32 whatever model.dtype says.
    low = held_out.make_record(dataclasses.replace(cfg, dtype="bfloat16"), probe.ROUTING)
    # For each kind, [2, L] of every batch: the decisions that flipped, and all decisions.
    counts: dict[str, list[np.ndarray]] = {}
    margins: list[np.ndarray] = []
    notes: dict[str, str] = {}
    for number, batch in enumerate(run.batches):
        whole = held_out.whole(batch, run.cfg.eval.batch_size)
        base = record_of(run.params, run.router_state, held_out.put_batch(run, batch))
        # A kind that the model does not allow is noted, and the others are measured.
        for kind, experts_now in _perturbed(run, record_of, low, batch, base["input"]).items():
            run.tell(f"batch {number + 1} of {len(run.batches)}, {kind}")
            counts.setdefault(kind, [])
            try:
                flipped = flips(base["expert"], experts_now(whole), cfg.moe.num_experts)
                counts[kind].append(flipped)
            except UserError as error:
                notes[kind] = str(error)
        try:
            margin_LBS = margin(scores(run, base["input"]), base["expert"].shape[3])
            margins.append(margin_LBS[:, whole.segment_BS > 0])
        except UserError as error:
            notes["margin"] = str(error)
    shares = {
        kind: share(np.sum(of_batches, 0)) for kind, of_batches in counts.items() if of_batches
    }
    return {"flips": shares, "margins": _quantiles(margins), "notes": notes}


def share(counts_2L: np.ndarray) -> list[float]:
    """Returns the share of decisions that flipped in each layer, from the counts of `flips`."""
    flipped_L, all_L = counts_2L
    return (flipped_L / np.maximum(all_L, 1)).tolist()


def _quantiles(margins: list[np.ndarray]) -> dict[str, list[float]]:
    """Returns {quantile: [L]} of the margins [L, N] of all batches; empty where there are none."""
    if not margins:
        return {}
    values_QL = np.quantile(np.concatenate(margins, 1), QUANTILES, axis=1)
    return {f"{q:g}": values_L.tolist() for q, values_L in zip(QUANTILES, values_QL, strict=True)}


def _perturbed(
    run: Run, record_of: Record, low: Record, batch: PackedText, input_LBSD: np.ndarray
) -> dict[str, Callable[[PackedText], np.ndarray]]:
    """Returns {kind: the batch of all processes -> the experts [L, B, S, K] that are taken now};
    `batch` is of this process.
    """
    reversed_B = np.arange(run.cfg.eval.batch_size)[::-1]

    def in_bfloat16(_: PackedText) -> np.ndarray:
        on_mesh = held_out.put_batch(run, batch)
        return low(run.params, run.router_state, on_mesh)["expert"]

    return {
        "router": lambda whole: rounded_router(run, input_LBSD, whole),
        "model": in_bfloat16,
        "order": lambda whole: _rearranged(run, record_of, whole, reversed_B),
        "size": lambda whole: _in_halves(run, record_of, whole),
    }


def flips(before_LBSK: np.ndarray, after_LBSK: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns [2, L]: the decisions of `before` that `after` does not make, and all decisions.

    The order of a token's experts does not count.
    """
    # [..., K, K]: whether choice i of before is among those of after.
    kept_LBSK = (before_LBSK[..., :, None] == after_LBSK[..., None, :]).any(-1)
    # num_experts stands where no expert was chosen: padding, and null experts.
    real_LBSK = before_LBSK < num_experts
    flipped_L = (real_LBSK & ~kept_LBSK).sum((1, 2, 3))
    return np.stack([flipped_L, real_LBSK.sum((1, 2, 3))])


def scores(run: Run, input_LBSD: np.ndarray) -> np.ndarray:
    """Returns the scores [L, B, S, E] of which the router takes the k largest.

    Raises UserError where a token's experts are not simply those.
    """
    moe, gate_LDE = run.cfg.model.moe, held_out.gates(run, "the margin")
    router, options = ROUTERS[moe.router], moe.router_options
    exact = router.declared(moe.num_experts, options).exact
    # All groups are kept where there are as many as are chosen.
    grouped = getattr(options, "top_groups", 1) != getattr(options, "num_groups", 1)
    if not exact or grouped:
        if exact:
            what = "chooses groups of experts first"
        else:
            what = "has no fixed number of choices for a token"
        raise UserError(
            f'model.moe.router = "{moe.router}" {what}, so the k-th score minus the next is no '
            "margin"
        )
    # In float64, so that the margin itself is not rounding.
    input_LBSD, gate_LDE = input_LBSD.astype(np.float64), gate_LDE.astype(np.float64)
    logits_LBSE = np.einsum("LBSD,LDE->LBSE", input_LBSD, gate_LDE)
    bias_LE = held_out.router_state(run.router_state, run.cfg.model).get("bias")
    if bias_LE is None:
        # A score that rises with the logit chooses as the logit does.
        return logits_LBSE
    return np.asarray(router.score(options)(logits_LBSE)) + bias_LE[:, None, None]


def margin(score_LBSE: np.ndarray, k: int) -> np.ndarray:
    """Returns [L, B, S]: the k-th largest score minus the next; infinite when every expert is
    chosen.
    """
    if k >= score_LBSE.shape[3]:
        return np.full(score_LBSE.shape[:3], np.inf)
    # In falling order, so place k - 1 is the last that is chosen.
    sorted_LBSE = -np.sort(-score_LBSE, -1)
    return sorted_LBSE[..., k - 1] - sorted_LBSE[..., k]


def rounded_router(run: Run, input_LBSD: np.ndarray, batch: PackedText) -> np.ndarray:
    """Returns the experts [L, B, S, K] that the router takes when its logits are those of a
    bfloat16 product.

    The rounded logits are given to the router itself as activations, with the identity as its gate,
    so that all that comes after the logits (softmax, bias, groups) is the router's own.
    """
    cfg = run.cfg.model
    gate_LDE = held_out.gates(run, "the precision of its logits")
    num_layers, num_rows, length, _ = input_LBSD.shape
    state = held_out.router_state(run.router_state, cfg)

    def flat(z_BS):
        return jnp.asarray(np.asarray(z_BS).reshape(-1))

    # [B] -> [B S]: the number of its row for every token.
    row_BS = np.repeat(batch.row_B, length)
    segment_T = flat(batch.segment_BS)
    # Token, position, row and segment, as Tokens has them.
    ids = (flat(batch.tokens_BS), flat(batch.position_BS), flat(row_BS), segment_T)
    router_cfg = RouterCfg(
        cfg.moe.num_experts, cfg.moe.router_options, cfg.moe.group_rows, cfg.vocab_size, lambda z: z
    )

    @jax.jit
    def route(x_TD: jax.Array, gate_DE: jax.Array, state: Any) -> jax.Array:
        x_TD, rounded_DE = x_TD.astype(jnp.bfloat16), gate_DE.astype(jnp.bfloat16)
        router_logits_TE = jnp.einsum("TD,DE->TE", x_TD, rounded_DE)
        tokens = Tokens(router_logits_TE, *ids, segment_T > 0, num_rows)
        identity = {"gate": jnp.eye(cfg.moe.num_experts, dtype=gate_DE.dtype)}
        routing = ROUTERS[cfg.moe.router].route(
            identity, state, tokens, cfg=router_cfg, rng=jax.random.key(0), train=False
        )
        if not (isinstance(routing, Routing) and routing.per_token):
            raise UserError(
                f'model.moe.router = "{cfg.moe.router}" does not choose k experts for each token'
            )
        return routing.expert_index_N.reshape(num_rows, length, -1)

    experts = []
    for layer in range(num_layers):
        x_TD = input_LBSD[layer].reshape(num_rows * length, -1)
        state_of_layer = {name: z[layer] for name, z in state.items()}
        experts.append(np.asarray(route(x_TD, gate_LDE[layer], state_of_layer)))
    return np.stack(experts)


def _rearranged(
    run: Run, record_of: Callable[..., Any], batch: PackedText, order_B: np.ndarray
) -> np.ndarray:
    """Returns the experts of the rows in another order, brought back to the first order; a row
    keeps its number, and so its randomness.
    """
    rows = held_out.local_rows(run.cfg.eval.batch_size)
    moved = jax.tree.map(lambda z: z[order_B][rows], batch)
    record = record_of(run.params, run.router_state, held_out.put_batch(run, moved))
    # The argsort of a permutation is its inverse.
    return record["expert"][:, np.argsort(order_B)]


def _in_halves(run: Run, record_of: Callable[..., Any], batch: PackedText) -> np.ndarray:
    """Returns the experts of the same rows in two batches of half the size."""
    size = run.cfg.eval.batch_size // 2
    devices = run.cfg.mesh.batch_devices
    halves = size > 0 and run.cfg.eval.batch_size % 2 == 0
    # Every device has the same number of rows, and they are whole groups.
    fits = size % devices == 0 and (size // devices) % run.cfg.model.moe.group_rows == 0
    if not (halves and fits):
        raise UserError(
            f"half of eval.batch_size ({size} rows) does not fit the mesh or model.moe.group_rows: "
            "take more rows"
        )
    half_sized = dataclasses.replace(run.cfg.eval, batch_size=size)
    smaller = run._replace(cfg=dataclasses.replace(run.cfg, eval=half_sized))
    rows = held_out.local_rows(size)
    experts = []
    for first in (0, size):
        half = jax.tree.map(lambda z, first=first: z[first : first + size][rows], batch)
        record = record_of(run.params, run.router_state, held_out.put_batch(smaller, half))
        experts.append(record["expert"])
    return np.concatenate(experts, 1)
