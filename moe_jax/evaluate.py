"""Held-out loss, token-weighted, per domain, on fixed batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.data.batches import eval_batches
from moe_jax.data.load import Dataset
from moe_jax.mesh import P
from moe_jax.models import depth
from moe_jax.models.decoder import with_dispatcher
from moe_jax.moe import load
from moe_jax.place import local_rows, put
from moe_jax.state import State, make_model
from moe_jax.tasks import lm


def make_evaluate(cfg: Config, dataset: Dataset) -> Callable[[State, int], dict[str, Any]]:
    """(state, number of batches, 0 = all) -> a dict of the held-out figures; compiled once, at first use.

    "loss" (nats per token), "bits_per_byte" (mean over domains), "accuracy", "domain/NAME/...", "max_vio" (of all held-out tokens,
    mean over MoE layers), "moe" (load figures of each), "routing" (counts
    of assignments per MoE layer, domain and expert [L, Z, E]).

    The last batch is filled up with padding, which counts nowhere; sums are added up in float64, so the result does not
    depend on how the rows fall into batches. Evaluates the moving average of the parameters where there is one.
    """
    model_cfg = cfg.model if cfg.eval.dispatcher == "same" else with_dispatcher(cfg.model, cfg.eval.dispatcher)
    model = make_model(model_cfg)
    bytes_V = np.zeros(cfg.model.vocab_size, np.int32)
    bytes_V[: dataset.tokenizer.vocab_size] = dataset.tokenizer.token_bytes()

    @jax.jit
    def sums_of(params: Any, router_state: Any, batch: lm.Inputs) -> Any:
        sums = lm.evaluate(model.bind(params, router_state), batch, jax.numpy.asarray(bytes_V), len(dataset.domains))
        return jax.sharding.reshard(sums, P())

    def evaluate(state: State, num_batches: int) -> dict[str, Any]:
        params = state.params if state.ema is None else state.ema
        size = cfg.eval.batch_size
        rows = local_rows(size)
        total: Any = None
        for batch in eval_batches(dataset, size, num_batches or None, rows):
            sums = sums_of(params, state.router_state, put(batch, rows, size, lm.Inputs))
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        return summary(total, dataset.domains)

    return evaluate


def summary(total: dict[str, Any], domains: Sequence[str]) -> dict[str, Any]:
    """Means from the sums of `lm.evaluate`; a domain without held-out rows is left out."""
    tokens = max(total["tokens"].sum(), 1)
    result = {"loss": total["nll"].sum() / tokens, "accuracy": total["correct"].sum() / tokens}
    bits = total["nll"] / math.log(2) / np.maximum(total["bytes"], 1)
    seen = total["bytes"] > 0
    for i, name in enumerate(domains):
        if seen[i]:
            result[f"domain/{name}/bits_per_byte"] = bits[i]
            result[f"domain/{name}/loss"] = total["nll"][i] / total["tokens"][i]
    result["bits_per_byte"] = bits[seen].mean()
    result = {name: float(value) for name, value in {**result, **depth.figures(total["depth"])}.items()}
    moe = {n: np.asarray(v) for n, v in load.metrics(total["moe"]).items()} if total["moe"] else {}
    if moe:
        result["max_vio"] = float(moe["max_vio"].mean())
    return {**result, "moe": moe, "routing": total["routing"]}
