"""A dense run as one with experts: `python -m moe_jax convert upcycle`.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): each expert begins as a copy of the
dense network. Here the hidden units of the dense network are dealt out:

    units 0 .. S-1                 to the shared experts, S their width
    then G shards of F units       to the routed experts, F their width: expert e has shard e mod G

G = 1 is plain upcycling, G > 1 is granular upcycling (He et al. 2024, arXiv:2410.07524): G experts
in a row are one virtual expert, with the same router weights, so a token takes all of its shards
together. G = 0 gives all units to the shared experts; routed ones begin with w_out = 0.

The gates of a token weigh the copies. w_out is divided by what they sum to, where it is one number
for all tokens, and then the new model computes what the dense one did.

Shapes: D model, P parts of w_in, H hidden of the dense network, E experts, F expert hidden.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.schema.config import ModelConfig
from moe_jax.surgery import gates

ROUTER_STARTS = ("draw", "zeros")


class Shares(NamedTuple):
    """Says which hidden units of a dense network go where."""

    # S: to the shared experts.
    shared: int
    # G: pieces of the others; 0 = there are no others.
    shards: int
    # F: of a piece.
    width: int


class Change(NamedTuple):
    """Holds how copies are made to differ. None of it is function-preserving but the zeros."""

    # Standard deviation of what is added, as a share of that of the weights.
    noise: float
    # Share of the units of each expert that are drawn anew.
    drop: float
    seed: int


def shares(hidden: int, moe: Any) -> Shares:
    """Returns how H units are dealt out. Raises UserError where they cannot be."""
    shared, width = moe.shared_width, moe.expert_hidden
    left = hidden - shared
    # Shared experts take all of them.
    if left == 0:
        return Shares(shared, 0, width)
    # Whole shards, of which all have as many experts.
    shards = left // width if left > 0 else 0
    fits = left > 0 and left % width == 0 and moe.num_experts % shards == 0
    if fits:
        return Shares(shared, shards, width)
    beside = f" beside {shared} of shared experts" if shared else ""
    # Widths that would fit, one for each number of shards.
    possible = []
    for n in range(1, moe.num_experts + 1):
        if left > 0 and left % n == 0 and moe.num_experts % n == 0:
            possible.append(left // n)
    hint = f"shared experts may have {hidden} units at most"
    if possible:
        hint = f"set model.moe.expert_hidden to one of {', '.join(map(str, possible))}"
    raise UserError(
        f"model.ffn_hidden = {hidden} of the dense run makes no {moe.num_experts} experts of "
        f"model.moe.expert_hidden = {width}{beside}: {hint}"
    )


def experts(
    w_in_DPH: np.ndarray, w_out_HD: np.ndarray, num_experts: int, share: Shares
) -> dict[str, np.ndarray]:
    """Returns {"w_in": [E, D, P, F], "w_out": [E, F, D]}: each expert a copy of its shard."""
    first = share.shared
    w_in, w_out = [], []
    for expert in range(num_experts):
        start = first + (expert % share.shards) * share.width
        units = slice(start, start + share.width)
        w_in.append(w_in_DPH[:, :, units])
        w_out.append(w_out_HD[units])
    return {"w_in": np.stack(w_in), "w_out": np.stack(w_out)}


def changed(weights: Mapping[str, np.ndarray], name: str, change: Change) -> dict[str, np.ndarray]:
    """Returns the experts of a layer with noise, and with some units drawn anew.

    `name`: of the layer, from which the draws follow, so that averages get the same ones.

    Drop-upcycling (Nakamura et al. 2025, arXiv:2502.19261, section 3): of each expert a share of
    the units, other ones in each, begins from N(mean, std) of the weights that it loses; the same
    units in all matrices.
    """
    rng = np.random.default_rng([change.seed, zlib.crc32(name.encode())])
    made = {key: x.astype(np.float64) for key, x in weights.items()}
    num_experts, width, _ = made["w_out"].shape
    for expert in range(num_experts if change.drop else 0):
        # Other units in each expert, and the same in all of its matrices.
        units = rng.permutation(width)[: round(change.drop * width)]
        for part in range(made["w_in"].shape[2]):
            _redraw(made["w_in"][expert, :, part], (slice(None), units), rng)
        _redraw(made["w_out"][expert], (units, slice(None)), rng)
    if change.noise:
        for key, x in made.items():
            deviation = change.noise * weights[key].astype(np.float64).std()
            made[key] = x + deviation * rng.normal(size=x.shape)
    return made


def _redraw(matrix: np.ndarray, units: Any, rng: np.random.Generator) -> None:
    """Draws some rows or columns of a matrix anew, in place."""
    lost = matrix[units]
    if lost.size:
        matrix[units] = rng.normal(lost.mean(), lost.std(), lost.shape)


def begun(
    router: Mapping[str, np.ndarray],
    axes: Mapping[str, int],
    start: str,
    share: Shares,
    layer: str,
    seed: int,
) -> dict[str, np.ndarray]:
    """Returns the first weights of the router of a layer from fresh ones.

    Args:
      axes: of each weight the dimension that counts experts, -1 for none.
      start: one of ROUTER_STARTS, or "normal:STD".
      layer, seed: what the draws follow from.
    """
    made = {}
    for name, x in router.items():
        axis = axes[name]
        # It belongs to all experts together.
        if axis < 0:
            made[name] = x
            continue
        if start == "zeros":
            x = np.zeros_like(x)
        elif start.startswith("normal:") and x.std() > 0:
            rng = np.random.default_rng([seed, zlib.crc32((layer + name).encode())])
            x = (float(start.partition(":")[2]) * rng.normal(size=x.shape)).astype(x.dtype)
        made[name] = x
    if share.shards > 1:
        made = {name: _in_groups(x, axes[name], share.shards) for name, x in made.items()}
    return made


def _in_groups(x: np.ndarray, axis: int, shards: int) -> np.ndarray:
    """Returns an array in which `shards` experts in a row have the values of the first of them."""
    if axis < 0:
        return x
    index = np.arange(x.shape[axis])
    return np.take(x, index - index % shards, axis)


def weight_of_copies(
    cfg: ModelConfig, router: Mapping[str, Any], state: Mapping[str, Any], share: Shares
) -> tuple[float, str]:
    """Returns what w_out is multiplied with, and why the function is not kept all the same; "" = it
    is.
    """
    if gates.mixes(cfg):
        return 1.0, "experts work on mixtures of tokens, which no copy of one network undoes"
    gate_TE = gates.measured(cfg, router, state)
    # Of each shard, what a token takes of it.
    gate_TG = gate_TE.reshape(len(gate_TE), -1, max(share.shards, 1)).sum(1)
    sum_of_gates = gates.constant(gate_TG)
    if sum_of_gates is not None:
        return 1 / sum_of_gates, ""
    mean = float(gate_TG.mean())
    what = "its gates sum" if share.shards < 2 else "the gates of a shard sum"
    reason = (
        f"{what} to {gate_TG.min():.3g} for one token and {gate_TG.max():.3g} for another, and no "
        "factor on w_out makes up for both"
    )
    return (1 / mean if mean > 0 else 1.0), reason
