"""What a task is: what a batch holds, the loss of every prediction, the figures of the field; and
what all tasks share.

A task gives the loss of *every* prediction; sums of them are taken here, once for all tasks, so
that micro-batches and devices add up. `objective` is the only place that divides.

Shapes: B rows, L MoE layers, E experts, Z domains.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batches import eval_batches
from moe_jax.data.contract import Data
from moe_jax.models import depth
from moe_jax.moe import load
from moe_jax.moe import losses as auxiliary_losses
from moe_jax.parallel.batch_rows import local_rows, put
from moe_jax.parallel.mesh import P
from moe_jax.runtime import stopping
from moe_jax.schema.config import Config

# Of an evaluation, by name.
Figures = Mapping[str, Any]
# Row -> column -> value.
Table = dict[str, dict[str, Any]]


# Totals that others are divided by. `balance_weight` is state of a router (moe/losses).
NUMBERS = ("tokens", "sequences", "micro_batches", "balance_weight")


class Further(NamedTuple):
    """Holds the losses of one depth of multi-token prediction (models/mtp.py)."""

    # Nats of every prediction, and its weight, as in Losses.
    nll: jax.Array
    weight: jax.Array
    # Whether the likeliest token is the right one, of the same shape; () in training.
    correct: Any
    # What the objective multiplies the mean with.
    coefficient: float


class Losses(NamedTuple):
    """Holds the results of one forward pass."""

    # Nats of every prediction [B, ...].
    nll: jax.Array
    # Weight of every prediction, of the same shape; 0 = padding.
    weight: jax.Array
    # What the model returns, as `evaluate` of the task reads it: mostly logits.
    outputs: Any
    # Sums of the layers for each row [L, B, ...], which add up over rows and devices.
    sums: dict[str, jax.Array]
    # What the objective adds for every prediction, and by which name; () = nothing.
    penalty: tuple[()] | tuple[str, jax.Array] = ()
    # Of further tokens, by the name of their depth; {} = none is predicted.
    further: Mapping[str, Further] = {}


class Trained(NamedTuple):
    """A model at the end of a run."""

    # (params, router state) -> the module
    bind: Callable[..., Any]
    params: Any
    router_state: Any
    # `by_row` of every row of the evaluation just made, in data.heldout_order().
    rows: Mapping[str, np.ndarray]


class Task(NamedTuple):
    """Holds all that there is to know of a task; `TASK` of its file.

    `cfg` is the whole Config, `data` what `open` returned (data/contract.py).
    """

    # The frozen dataclass of its block in the config.
    options: type
    # Names of the models that can learn it.
    kinds: tuple[str, ...]

    # Of the table at the end of a run.
    title: str
    # cfg -> data
    open: Callable[[Config], Any]
    # (model, batch, rng, train) -> Losses
    losses: Callable[..., Losses]
    # (losses, batch, data) -> sums, traced: the figures of the field.
    evaluate: Callable[..., dict[str, Any]]
    # (sums in float64, data) -> figures; "loss" is among them, lower is better.
    summary: Callable[..., dict[str, float]]
    # Of the figures of an evaluation, in one line.
    headline: Callable[[Figures], str]
    # (cfg, Trained, data, workdir) -> further figures, at the end of a run; writes the predictions.
    # All processes call it.
    finish: Callable[..., dict[str, Any]]
    # (cfg, data, figures) -> {row: {column: value}}: the table of the model beside its rivals.
    comparison: Callable[..., Table]
    # (cfg, step) -> a batch of NumPy arrays, as `data` has them, for verify, bench and the resource
    # card.
    random: Callable[[Config, int], Any]
    # It predicts the next token of a text: its data are data.sources, its model can write.
    is_language: bool = False
    # Parts of a batch that must not change a prediction, for proofs: "future" tokens, another
    # "document" of the row.
    hidden: tuple[str, ...] = ()


def forward(task: Task, model: Callable, batch: Any, rng: jax.Array) -> dict[str, Any]:
    """Returns the training sums of a (micro-)batch.

    They are nll (nats), tokens (the weight of the predictions), and the totals of the layers
    [L, ...], `moe` and `depth`; of further tokens the same of each depth.
    """
    # The losses of single predictions become sums here, and are divided in `objective` alone.
    losses = task.losses(model, batch, rng, True)
    totals: dict[str, Any] = {
        "nll": weighed(losses.nll, losses),
        "tokens": counted(losses),
        **of_layers(losses.sums),
    }
    if losses.penalty:
        name, penalty = losses.penalty
        totals["penalty"] = {name: weighed(penalty, losses)}
    if losses.further:
        totals["further"] = {name: _of_depth(one) for name, one in losses.further.items()}
    return totals


def weighed(values: Any, losses: Losses | Further) -> jax.Array:
    """Returns the sum of values of every prediction, each times its weight."""
    weight = losses.weight.astype(losses.nll.dtype)
    # Not values * weight alone: 0 times an infinite loss of padding is NaN.
    return jnp.where(weight > 0, values * weight, 0).sum()


def counted(losses: Losses | Further) -> jax.Array:
    """Returns the sum of the weights of all predictions."""
    return losses.weight.astype(losses.nll.dtype).sum()


def _of_depth(further: Further) -> dict[str, jax.Array]:
    """Returns the sums of one depth of multi-token prediction."""
    nll = weighed(further.nll, further)
    # What is added to the loss, before it is divided.
    penalty = further.coefficient * nll
    return {"nll": nll, "tokens": counted(further), "penalty": penalty}


def of_layers(sums: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Returns the totals of the layers of a (micro-)batch, each [L, ...], from their sums per row.

    Every layer's are its own, so those of some layers can be computed apart from the others.
    """
    return {"moe": load.totals(depth.without(sums)), "depth": depth.totals(sums)}


def objective(
    totals: Mapping[str, Any], coefficients: Mapping[str, float]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss that is differentiated, and its parts by name.

    The loss is nats per prediction plus the auxiliary losses of the layers.
    """
    # At least 1: a batch of padding alone has no predictions.
    num_predictions = jnp.maximum(totals["tokens"], 1)
    nll = totals["nll"] / num_predictions
    loss = nll
    parts = {"nll": nll, **depth.figures(totals["depth"])}
    for name, total in totals.get("penalty", {}).items():
        parts[name] = total / num_predictions
        loss = loss + parts[name]
    for name, total in totals.get("further", {}).items():
        # Fewer than those of the next token, for documents end.
        num_further = jnp.maximum(total["tokens"], 1)
        parts[f"{name}_nll"] = total["nll"] / num_further
        loss = loss + total["penalty"] / num_further
    if totals["depth"]:
        loss = loss + depth.penalty(totals["depth"]).astype(nll.dtype)
    if totals["moe"]:
        # Routers compute in float32 or wider, and so are their losses.
        auxiliary, values = auxiliary_losses.auxiliary(totals["moe"], coefficients)
        loss = loss + auxiliary.astype(nll.dtype)
        parts |= {f"{name}_loss": value for name, value in values.items()}
    return loss, parts


def numbers(totals: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the totals that others are divided by, which no parameter changes."""
    own = {name: total for name, total in totals.items() if name in NUMBERS}
    inner = {name: numbers(total) for name, total in totals.items() if isinstance(total, dict)}
    return own | {name: found for name, found in inner.items() if found}


def with_numbers(totals: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the totals with `numbers` of others in place of their own."""
    return {
        name: with_numbers(total, given.get(name, {}))
        if isinstance(total, dict)
        else given.get(name, total)
        for name, total in totals.items()
    }


def evaluate(task: Task, model: Callable, batch: Any, data: Any) -> dict[str, Any]:
    """Returns held-out sums: what the task adds up, the layers' totals, and `routing`.

    That is the assignments per MoE layer, domain and expert [L, Z, E]. `rows` and `row_routing` [B]
    are no sums over the batch but what each row gives.
    """
    # The key is unused: an evaluation draws nothing.
    losses = task.losses(model, batch, jax.random.key(0), False)
    # Held-out rows are of one domain each, so the first place has that of the row.
    domain_B = batch.domain_BS[:, 0] if hasattr(batch, "domain_BS") else batch.domain_B
    moe_sums = depth.without(losses.sums)
    return {
        **task.evaluate(losses, batch, data),
        "further": {name: _heldout_of_depth(one) for name, one in losses.further.items()},
        "moe": load.totals(moe_sums),
        "depth": depth.totals(losses.sums),
        "routing": routing_by_domain(moe_sums, domain_B, len(data.domains)),
        "rows": by_row(losses),
        "row_routing": {"domain": domain_B, "experts": experts_by_row(moe_sums, len(domain_B))},
    }


def _heldout_of_depth(further: Further) -> dict[str, jax.Array]:
    """Returns the held-out sums of one depth of multi-token prediction."""
    correct = weighed(further.correct, further)
    return {**_of_depth(further), "correct": correct}


def by_row(losses: Losses) -> dict[str, jax.Array]:
    """Returns of each row [B]: nats, and the weight of its predictions."""
    places = tuple(range(1, losses.nll.ndim))
    weight = losses.weight.astype(losses.nll.dtype)
    return {
        "nats": jnp.where(weight > 0, losses.nll * weight, 0).sum(places),
        "tokens": weight.sum(places),
    }


def of_heldout(
    cfg: Config, trained: Trained, data: Data, question: Callable[..., Any]
) -> tuple[np.ndarray, Any]:
    """Asks a model about every held-out row; every host gets all answers.

    Returns the rows' indices in the data [R], and the answers `question(model, batch)`, a pytree of
    arrays [R, ...] in the same order.
    """

    @jax.jit
    def answer(params: Any, router_state: Any, batch: Any) -> Any:
        model = trained.bind(params, router_state)
        # Whole on every device, so that each host can read all of it.
        return jax.sharding.reshard(question(model, batch), P())

    size = cfg.eval.batch_size
    rows = local_rows(size)
    answers = []
    for batch in eval_batches(data, size, None, rows):
        stopping.check()
        of_batch = answer(trained.params, trained.router_state, put(batch, rows, size))
        answers.append(jax.tree.map(np.asarray, of_batch))
    _, index_R = data.heldout_order()

    def joined(*batches: np.ndarray) -> np.ndarray:
        # Rows that fill up the last batch come behind all others.
        return np.concatenate(batches)[: len(index_R)]

    return index_R, jax.tree.map(joined, *answers)


def write_predictions(workdir: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes predictions.jsonl, an object a line for every held-out row, in the first process."""
    if jax.process_index() != 0:
        return
    lines = []
    for row in rows:
        # The other processes wait meanwhile, so one of several may not leave by itself.
        stopping.check_alone()
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (workdir / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")


def by_domain(x: jax.Array, keep: jax.Array, domain: jax.Array, num_domains: int) -> jax.Array:
    """Returns the sums [Z] of x where `keep`; all of one shape, [B] or [B, S]."""
    # Z becomes the last dimension of all, and the others are summed over.
    rows_and_places = tuple(range(domain.ndim))
    domain_Z = jnp.arange(num_domains)
    domain_Z = jnp.expand_dims(domain_Z, rows_and_places)
    counts = (domain[..., None] == domain_Z) & keep[..., None]
    return jnp.where(counts, x[..., None], 0).sum(rows_and_places)


def experts_by_row(sums: Mapping[str, jax.Array], num_rows: int) -> jax.Array:
    """Returns the assignments of each row to the experts of each MoE layer, [B, L, E]."""
    # Without MoE layers there are no experts to count.
    if not sums:
        return jnp.zeros((num_rows, 0, 1))
    # [L, B, E] -> [B, L, E]: rows come first, as in all that an evaluation keeps of a row.
    return jnp.moveaxis(sums["counts"], 1, 0)


def routing_by_domain(
    sums: Mapping[str, jax.Array], domain_B: jax.Array, num_domains: int
) -> jax.Array:
    """Returns the assignments per MoE layer, domain and expert, [L, Z, E]."""
    if not sums:
        return jnp.zeros((0, num_domains, 1))
    domain_BZ = (domain_B[:, None] == jnp.arange(num_domains)[None]).astype(sums["counts"].dtype)
    # Summed over the rows of all devices, and whole on each of them.
    return jnp.einsum("LBE,BZ->LZE", sums["counts"], domain_BZ, out_sharding=P())
