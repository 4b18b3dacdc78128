"""What the routing is worth: the held-out loss under another routing than the model's own,
everything else as it is.

    own        recorded and replayed: no gap, which proves the replay
    frozen     as an earlier checkpoint of the run routes the same batches
    shuffled   the assignments of a batch (a token's experts and gates) dealt out anew among its
               tokens: every expert keeps its load
    balanced   equally many tokens for every expert, and of all such assignments the one with the
               highest total router probability (a transport problem, solved exactly; each token's
               gates are its probabilities, of softmax or of the router's own score, scaled to the
               sum of its own gates)
    random     k different experts, uniformly, with the token's own gates

All MoE layers are replaced at once, by the router "recorded"; other parameters are those of the
checkpoint. `under` makes the same model for training: a step takes the routing from
`Request.recorded`. retrain.py goes on training under each way.

Shapes: L MoE layers, B rows, S sequence, K choices, E experts, N valid tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batches import PackedText
from moe_jax.errors import UserError
from moe_jax.instruments import held_out
from moe_jax.instruments.held_out import Arrays, Run
from moe_jax.moe import probe
from moe_jax.moe.routing import ROUTERS, recorded
from moe_jax.schema.config import ModelConfig
from moe_jax.train_step import make_model

# The router that replays a recording.
ROUTER = next(name for name, router in ROUTERS.items() if router.replays)


class Seen(NamedTuple):
    """Holds what a way of routing may use: the model's own routing of a batch, and what its router
    thought.
    """

    expert_LBSK: np.ndarray
    gate_LBSK: np.ndarray
    valid_BS: np.ndarray
    probs_LBSE: Callable[[], np.ndarray]
    num_experts: int
    rng: np.random.Generator


def under(cfg: ModelConfig, num_choices: int, gates: str) -> ModelConfig:
    """Returns the model with the router "recorded" in place of its own.

    Args:
      gates: "recorded", or "router", whose gates then learn.
    """
    declared = ROUTERS[cfg.moe.router].declared(cfg.moe.num_experts, cfg.moe.router_options)
    # Capacity follows the load that the router means to have.
    options = recorded.Options(k=num_choices, gates=gates, average=declared.average or 0.0)
    moe = dataclasses.replace(cfg.moe, router=ROUTER, router_options=options)
    return dataclasses.replace(cfg, moe=moe)


def fitted(values: Mapping[Any, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the weights of a model as those of the same model `under` another routing (`like`):
    what its router lacks is zero.
    """

    def one(key: Any, wanted: Any) -> Any:
        if isinstance(wanted, Mapping):
            return fitted(values.get(key, {}), wanted)
        if key in values and values[key].shape == wanted.shape:
            return values[key]
        place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), wanted.sharding.spec)
        return jnp.zeros(wanted.shape, wanted.dtype, device=place)

    return {key: one(key, wanted) for key, wanted in like.items()}


def own(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Returns the model's own routing."""
    return seen.expert_LBSK, seen.gate_LBSK


def shuffled(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Deals the assignments of a layer out anew among its tokens.

    A token's experts and gates stay together, so its experts stay different and every load stays
    what it is.
    """
    expert, gate = seen.expert_LBSK.copy(), seen.gate_LBSK.copy()
    for layer in range(len(expert)):
        order_N = seen.rng.permutation(int(seen.valid_BS.sum()))
        for z_LBSK in (expert, gate):
            z_LBSK[layer][seen.valid_BS] = z_LBSK[layer][seen.valid_BS][order_N]
    return expert, gate


def uniform(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Draws k different experts for each token; places that the router left empty stay empty."""
    draws = seen.rng.random(seen.expert_LBSK.shape[:3] + (seen.num_experts,))
    expert = np.argsort(draws, -1)[..., : seen.expert_LBSK.shape[3]]
    return np.where(seen.expert_LBSK < seen.num_experts, expert, seen.num_experts), seen.gate_LBSK


def balanced(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Returns the assignment that is balanced and has the highest router probability.

    Raises UserError for a router that leaves places empty.
    """
    expert, gate, probs = seen.expert_LBSK.copy(), seen.gate_LBSK.copy(), seen.probs_LBSE()
    num_choices = expert.shape[3]
    if (expert[:, seen.valid_BS] == seen.num_experts).any():
        raise UserError(
            "balanced replay needs a router that gives every token all of its k experts"
        )
    for layer in range(len(expert)):
        probs_NE = probs[layer][seen.valid_BS]
        chosen_NK = best_balanced(probs_NE, num_choices)
        taken_NK = np.take_along_axis(probs_NE, chosen_NK, 1)
        sum_N1 = gate[layer][seen.valid_BS].sum(1, keepdims=True)
        expert[layer][seen.valid_BS] = chosen_NK
        share_NK = taken_NK / np.maximum(taken_NK.sum(1, keepdims=True), 1e-30)
        gate[layer][seen.valid_BS] = share_NK * sum_N1
    return expert, gate


def best_balanced(probs_NE: np.ndarray, num_choices: int) -> np.ndarray:
    """Returns [N, K]: k different experts for each token, at most ceil(N k / E) tokens for each
    expert, with the largest total probability.

    It is the linear program of a transport problem, whose corners are whole numbers. A token's
    experts are in order of falling probability.
    """
    from scipy import optimize, sparse

    num, num_experts = probs_NE.shape
    rows = sparse.kron(sparse.eye(num), np.ones((1, num_experts)), format="csr")
    columns = sparse.kron(np.ones((1, num)), sparse.eye(num_experts), format="csr")
    result = optimize.linprog(
        -probs_NE.ravel(),
        A_ub=columns,
        b_ub=np.full(num_experts, -(-num * num_choices // num_experts)),
        A_eq=rows,
        b_eq=np.full(num, num_choices),
        bounds=(0, 1),
        method="highs-ds",
    )
    chosen_NE = result.x.reshape(num, num_experts) > 0.5
    assert (chosen_NE.sum(1) == num_choices).all()
    return np.argsort(np.where(chosen_NE, -probs_NE, np.inf), 1, kind="stable")[:, :num_choices]


WAYS: dict[str, Callable[[Seen], tuple[np.ndarray, np.ndarray]]] = {
    "own": own,
    "shuffled": shuffled,
    "balanced": balanced,
    "random": uniform,
}


def evaluate(
    run: Run, earlier: Mapping[int, tuple[Any, Any]], seed: int
) -> dict[str, dict[str, Any]]:
    """Returns {way: figures}: "bits_per_byte", "loss", "domain/NAME/..." and the gaps of both to
    the model's own routing ("gap/...").

    A way that this router does not allow has no figures but the reason, under "note".

    Args:
      earlier: {step: (params, router state)} of earlier checkpoints, each the way "frozen STEP".
      seed: of the shuffled and random ways.
    """
    plain = held_out.make_sums(run, run.cfg.model)
    record_of = held_out.make_record(run.cfg.model, probe.INPUTS)
    sums: dict[str, list[Any]] = {}
    notes: dict[str, str] = {}
    replayed: Callable[..., Any] | None = None
    for number, batch in enumerate(run.batches):
        on_mesh = held_out.place(run, batch)
        run.tell(f"batch {number + 1} of {len(run.batches)}, the model itself")
        sums.setdefault("model", []).append(plain(run.params, run.router_state, on_mesh))
        record = record_of(run.params, run.router_state, on_mesh)
        replayed = replayed or _replay(run, record["expert"].shape[3])
        seen = make_seen(run, batch, record, np.random.default_rng([seed, number]))
        frozen = {
            f"frozen {step}": functools.partial(_frozen, record_of, *old, on_mesh)
            for step, old in earlier.items()
        }
        for name, way in {**WAYS, **frozen}.items():
            run.tell(f"batch {number + 1} of {len(run.batches)}, {name}")
            try:
                sums.setdefault(name, []).append(replayed(batch, way(seen)))
            except UserError as error:
                notes[name] = str(error)
    return gaps(run, sums, notes, "model")


def make_seen(run: Run, batch: PackedText, record: Arrays, rng: np.random.Generator) -> Seen:
    """Returns what a way may use of a record of `batch`."""
    valid_BS = held_out.whole(batch, run.cfg.eval.batch_size).segment_BS > 0

    def probs():
        return _probabilities(run, record["input"])

    return Seen(
        record["expert"], record["gate"], valid_BS, probs, run.cfg.model.moe.num_experts, rng
    )


def _frozen(
    record_of: Callable[..., Arrays], params: Any, router_state: Any, batch: Any, seen: Seen
):
    """Returns the routing of another checkpoint, which does not depend on that of this one."""
    del seen
    record = record_of(params, router_state, batch)
    return record["expert"], record["gate"]


def _replay(run: Run, num_choices: int) -> Callable[..., Any]:
    """Returns (batch, routing) -> the held-out sums of the model under that routing."""
    cfg = under(run.cfg.model, num_choices, "recorded")
    like = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    weights = tuple(fitted(z, l) for z, l in zip((run.params, run.router_state), like, strict=True))
    sums_of = held_out.make_sums(run, cfg)

    def replayed(batch: Any, routing: tuple[np.ndarray, np.ndarray]) -> Any:
        expert, gate = (held_out.of_all_blocks(cfg, z) for z in routing)
        return sums_of(
            *weights, held_out.place(run, batch, probe.Request((expert.astype(np.int32), gate)))
        )

    return replayed


def _probabilities(run: Run, input_LBSD: np.ndarray) -> np.ndarray:
    gate_LDE = held_out.gates(run, "balanced replay")
    logits = np.einsum("LBSD,LDE->LBSE", input_LBSD.astype(np.float64), gate_LDE.astype(np.float64))
    moe = run.cfg.model.moe
    score = np.asarray(ROUTERS[moe.router].score(moe.router_options)(logits))
    return score / score.sum(-1, keepdims=True)


def gaps(
    run: Run, sums: Mapping[str, list[Any]], notes: Mapping[str, str], to: str
) -> dict[str, dict[str, Any]]:
    """Returns {way: figures of its sums of all batches, and their gaps to those of the way `to`},
    and the notes.
    """
    every = {
        name: _scalars(held_out.figures(run, s))
        for name, s in sums.items()
        if len(s) == len(run.batches)
    }
    base = every[to]
    result = {
        name: row
        | {
            f"gap/{key}": row[key] - base[key]
            for key in row
            if key.endswith(("bits_per_byte", "loss"))
        }
        for name, row in every.items()
    }
    return result | {name: {"note": text} for name, text in notes.items()}


def _scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if np.ndim(value) == 0 and name != "moe"}
