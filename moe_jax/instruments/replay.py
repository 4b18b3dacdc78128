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


class OwnRouting(NamedTuple):
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
    result: dict[Any, Any] = {}
    for key, wanted in like.items():
        if isinstance(wanted, Mapping):
            result[key] = fitted(values.get(key, {}), wanted)
        elif key in values and values[key].shape == wanted.shape:
            result[key] = values[key]
        # Of the router that replays: nobody reads it.
        else:
            sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), wanted.sharding.spec)
            result[key] = jnp.zeros(wanted.shape, wanted.dtype, device=sharding)
    return result


def own(routing: OwnRouting) -> tuple[np.ndarray, np.ndarray]:
    """Returns the model's own routing."""
    return routing.expert_LBSK, routing.gate_LBSK


def shuffled(routing: OwnRouting) -> tuple[np.ndarray, np.ndarray]:
    """Deals the assignments of a layer out anew among its tokens.

    A token's experts and gates stay together, so its experts stay different and every load stays
    what it is.
    """
    valid_BS = routing.valid_BS
    expert_LBSK, gate_LBSK = routing.expert_LBSK.copy(), routing.gate_LBSK.copy()
    for expert_BSK, gate_BSK in zip(expert_LBSK, gate_LBSK, strict=True):
        order_N = routing.rng.permutation(int(valid_BS.sum()))
        # Padding keeps its empty places.
        expert_BSK[valid_BS] = expert_BSK[valid_BS][order_N]
        gate_BSK[valid_BS] = gate_BSK[valid_BS][order_N]
    return expert_LBSK, gate_LBSK


def uniform(routing: OwnRouting) -> tuple[np.ndarray, np.ndarray]:
    """Draws k different experts for each token; places that the router left empty stay empty."""
    num_choices = routing.expert_LBSK.shape[3]
    # The first k of a random order are k different experts.
    draw_LBSE = routing.rng.random((*routing.expert_LBSK.shape[:3], routing.num_experts))
    drawn_LBSK = np.argsort(draw_LBSE, -1)[..., :num_choices]
    used_LBSK = routing.expert_LBSK < routing.num_experts
    return np.where(used_LBSK, drawn_LBSK, routing.num_experts), routing.gate_LBSK


def balanced(routing: OwnRouting) -> tuple[np.ndarray, np.ndarray]:
    """Returns the assignment that is balanced and has the highest router probability.

    Raises UserError for a router that leaves places empty.
    """
    valid_BS = routing.valid_BS
    expert_LBSK, gate_LBSK = routing.expert_LBSK.copy(), routing.gate_LBSK.copy()
    probs_LBSE = routing.probs_LBSE()
    num_choices = expert_LBSK.shape[3]
    if (expert_LBSK[:, valid_BS] == routing.num_experts).any():
        raise UserError(
            "balanced replay needs a router that gives every token all of its k experts"
        )
    for layer in range(len(expert_LBSK)):
        probs_NE = probs_LBSE[layer][valid_BS]
        chosen_NK = best_balanced(probs_NE, num_choices)
        # Probabilities of the chosen experts as gates, scaled to the sum that the token's had.
        taken_NK = np.take_along_axis(probs_NE, chosen_NK, 1)
        share_NK = taken_NK / np.maximum(taken_NK.sum(1, keepdims=True), 1e-30)
        sum_N1 = gate_LBSK[layer][valid_BS].sum(1, keepdims=True)
        expert_LBSK[layer][valid_BS] = chosen_NK
        gate_LBSK[layer][valid_BS] = share_NK * sum_N1
    return expert_LBSK, gate_LBSK


def best_balanced(probs_NE: np.ndarray, num_choices: int) -> np.ndarray:
    """Returns [N, K]: k different experts for each token, at most ceil(N k / E) tokens for each
    expert, with the largest total probability.

    It is the linear program of a transport problem, whose corners are whole numbers. A token's
    experts are in order of falling probability.
    """
    from scipy import optimize, sparse

    # maximise  sum of p[n, e] x[n, e]   with 0 <= x <= 1,
    #   sum over e of x[n, e]  = k                  for each token,
    #   sum over n of x[n, e] <= ceil(N k / E)      for each expert.
    num_tokens, num_experts = probs_NE.shape
    even_load = -(-num_tokens * num_choices // num_experts)
    # Two sparse matrices on x as one long vector, token by token.
    sums_of_tokens = sparse.kron(sparse.eye(num_tokens), np.ones((1, num_experts)), format="csr")
    sums_of_experts = sparse.kron(np.ones((1, num_tokens)), sparse.eye(num_experts), format="csr")
    # The dual simplex ends in a corner; an interior point would not be whole.
    result = optimize.linprog(
        -probs_NE.ravel(),
        A_ub=sums_of_experts,
        b_ub=np.full(num_experts, even_load),
        A_eq=sums_of_tokens,
        b_eq=np.full(num_tokens, num_choices),
        bounds=(0, 1),
        method="highs-ds",
    )
    chosen_NE = result.x.reshape(num_tokens, num_experts) > 0.5
    assert (chosen_NE.sum(1) == num_choices).all()
    # Experts that are not chosen sort behind all others.
    falling_NE = np.where(chosen_NE, -probs_NE, np.inf)
    return np.argsort(falling_NE, 1, kind="stable")[:, :num_choices]


WAYS: dict[str, Callable[[OwnRouting], tuple[np.ndarray, np.ndarray]]] = {
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
        on_mesh = held_out.put_batch(run, batch)
        run.tell(f"batch {number + 1} of {len(run.batches)}, the model itself")
        sums.setdefault("model", []).append(plain(run.params, run.router_state, on_mesh))
        record = record_of(run.params, run.router_state, on_mesh)
        # The first record tells how many choices a token has.
        replayed = replayed or _replay(run, record["expert"].shape[3])
        routing = own_routing(run, batch, record, np.random.default_rng([seed, number]))
        frozen = {
            f"frozen {step}": functools.partial(_frozen, record_of, *old, on_mesh)
            for step, old in earlier.items()
        }
        for name, way in {**WAYS, **frozen}.items():
            run.tell(f"batch {number + 1} of {len(run.batches)}, {name}")
            try:
                sums.setdefault(name, []).append(replayed(batch, way(routing)))
            except UserError as error:
                notes[name] = str(error)
    return gaps(run, sums, notes, "model")


def own_routing(
    run: Run, batch: PackedText, record: Arrays, rng: np.random.Generator
) -> OwnRouting:
    """Returns what a way may use of a record of `batch`."""
    valid_BS = held_out.whole(batch, run.cfg.eval.batch_size).segment_BS > 0

    def probs():
        return _probabilities(run, record["input"])

    # A function, not the probabilities: not every router has a linear gate, and only `balanced`
    # needs one.
    num_experts = run.cfg.model.moe.num_experts
    return OwnRouting(record["expert"], record["gate"], valid_BS, probs, num_experts, rng)


def _frozen(
    record_of: Callable[..., Arrays],
    params: Any,
    router_state: Any,
    batch: Any,
    routing: OwnRouting,
):
    """Returns the routing of another checkpoint, which does not depend on that of this one."""
    del routing
    record = record_of(params, router_state, batch)
    return record["expert"], record["gate"]


def _replay(run: Run, num_choices: int) -> Callable[..., Any]:
    """Returns (batch, routing) -> the held-out sums of the model under that routing."""
    cfg = under(run.cfg.model, num_choices, "recorded")
    like_params, like_state = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    params = fitted(run.params, like_params)
    router_state = fitted(run.router_state, like_state)
    sums_of = held_out.make_sums(run, cfg)

    def replayed(batch: Any, routing: tuple[np.ndarray, np.ndarray]) -> Any:
        return sums_of(params, router_state, put_routed(run, batch, *routing))

    return replayed


def put_routed(
    run: Run, batch: PackedText, expert_LBSK: np.ndarray, gate_LBSK: np.ndarray
) -> PackedText:
    """Returns the batch on the mesh, with the routing that the router "recorded" shall replay."""
    cfg = run.cfg.model
    # A request has a place for every block, those without experts too.
    expert_BMSK = held_out.of_all_blocks(cfg, expert_LBSK).astype(np.int32)
    gate_BMSK = held_out.of_all_blocks(cfg, gate_LBSK)
    return held_out.put_batch(run, batch, probe.Request((expert_BMSK, gate_BMSK)))


def _probabilities(run: Run, input_LBSD: np.ndarray) -> np.ndarray:
    """Returns the router's scores [L, B, S, E], scaled so that those of a token add up to 1."""
    gate_LDE = held_out.gates(run, "balanced replay").astype(np.float64)
    # What the router read was recorded; its scores are computed again, in float64.
    logits_LBSE = np.einsum("LBSD,LDE->LBSE", input_LBSD.astype(np.float64), gate_LDE)
    moe = run.cfg.model.moe
    score_LBSE = np.asarray(ROUTERS[moe.router].score(moe.router_options)(logits_LBSE))
    return score_LBSE / score_LBSE.sum(-1, keepdims=True)


def gaps(
    run: Run, sums: Mapping[str, list[Any]], notes: Mapping[str, str], to: str
) -> dict[str, dict[str, Any]]:
    """Returns {way: figures of its sums of all batches, and their gaps to those of the way `to`},
    and the notes.
    """
    # A way that was refused in some batch has no figures, but a note.
    figures_of = {
        way: _scalars(held_out.figures(run, of_batches))
        for way, of_batches in sums.items()
        if len(of_batches) == len(run.batches)
    }
    base = figures_of[to]
    result: dict[str, dict[str, Any]] = {}
    for way, figures in figures_of.items():
        compared = [key for key in figures if key.endswith(("bits_per_byte", "loss"))]
        result[way] = figures | {f"gap/{key}": figures[key] - base[key] for key in compared}
    return result | {way: {"note": reason} for way, reason in notes.items()}


def _scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures that are one number each."""
    return {name: value for name, value in figures.items() if np.ndim(value) == 0 and name != "moe"}
