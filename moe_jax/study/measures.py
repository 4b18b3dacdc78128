"""Further figures of a trained model, which a study asks for by name.

Shapes: B rows, S positions of a row.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.bench import ours
from moe_jax.data.batches import PackedText, eval_batches
from moe_jax.data.contract import Data
from moe_jax.errors import UserError
from moe_jax.parallel.batch_rows import local_rows, put
from moe_jax.parallel.mesh import P
from moe_jax.plan import flops
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.tasks.lm import task as lm
from moe_jax.train_step import State, judged

# Prefixes of each row, and rows, by which a leak is measured.
NUM_PREFIXES, NUM_ROWS = 16, 96
# Rows that are decoded at once, new tokens of each, and rounds of every timing.
DECODED_ROWS, NEW_TOKENS, ROUNDS = (1, 8, 64), 16, 7


class Trained(NamedTuple):
    """A model at the end of its run; the mesh is set by the caller."""

    cfg: Config
    data: Data
    bind: Callable[..., Any]
    state: State


def prefix(trained: Trained) -> dict[str, float]:
    """Returns how much better tokens are predicted when the model sees the rest of their row.

    A token's loss is taken twice: with the whole row in the model, and with the row cut behind the
    token, as it is when a text is written. "leak_bits" is the second minus the first, in bits per
    byte; it is 0 for a causal model, but for rounding. "prefix_bits_per_byte" is the loss of the
    model that can be decoded.
    """
    cfg, data = trained.cfg, trained.data
    if not hasattr(data, "tokenizer"):
        raise UserError('the measure "prefix" needs a language model (task = "lm")')

    @jax.jit
    def nll_of(params: Any, router_state: Any, batch: PackedText) -> jax.Array:
        model = trained.bind(params, router_state)
        losses = lm.losses(model, batch, jax.random.key(0), False)
        return jax.sharding.reshard(losses.nll, P())

    size = cfg.eval.batch_size
    rows = local_rows(size)
    bytes_V = np.asarray(data.tokenizer.token_bytes())
    # Evenly spaced, and without the first: there is nothing to see before it.
    positions = np.linspace(0, cfg.data.seq_len - 1, NUM_PREFIXES + 1)[1:]
    # In a short row two of them may be one.
    positions = np.unique(positions.astype(int))
    num_batches = -(-NUM_ROWS // size)
    params, router_state = judged(trained.state), trained.state.router_state
    # Sums over the same tokens: seen with their whole row, and with the row cut behind them.
    whole, cut, num_bytes = 0.0, 0.0, 0
    for batch in eval_batches(data, size, num_batches, rows):
        whole_BS = np.asarray(nll_of(params, router_state, put(batch, rows, size)), np.float64)
        for position in positions:
            # Padding is of segment 0.
            valid_B = batch.segment_BS[:, position] > 0
            of_prefix = put(cut_behind(batch, position), rows, size)
            cut_BS = np.asarray(nll_of(params, router_state, of_prefix), np.float64)
            whole += whole_BS[valid_B, position].sum()
            cut += cut_BS[valid_B, position].sum()
            targets = batch.targets_BS[valid_B, position]
            num_bytes += int(bytes_V[targets].sum())
    # From nats to bits, and from tokens to the bytes that they stand for.
    bits = 1 / (np.log(2) * max(num_bytes, 1))
    return {
        "whole_bits_per_byte": whole * bits,
        "prefix_bits_per_byte": cut * bits,
        "leak_bits": (cut - whole) * bits,
    }


def cut_behind(batch: PackedText, position: int) -> PackedText:
    """Returns the rows with padding behind a position."""
    keep_S = np.arange(batch.tokens_BS.shape[1]) <= position

    def cut(z_BS: np.ndarray) -> np.ndarray:
        return np.where(keep_S[None], z_BS, 0)

    return batch._replace(
        tokens_BS=cut(batch.tokens_BS),
        targets_BS=cut(batch.targets_BS),
        segment_BS=cut(batch.segment_BS),
        position_BS=cut(batch.position_BS),
    )


def decoding(trained: Trained) -> dict[str, float]:
    """Returns the time of decoding over that of a dense model with as many active parameters.

    "decode_ratio_N" is for N rows at once. Both models are timed in turn, with random weights of
    their own; the figure is the median of the ratios of the rounds.
    """
    cfg = trained.cfg
    dense = dataclasses.replace(cfg, model=dense_twin(cfg.model))
    rounds = 1 if cfg.smoke else ROUNDS
    figures = {}
    for num_rows in DECODED_ROWS[:1] if cfg.smoke else DECODED_ROWS:
        options = {"batch": num_rows, "prompt": 8, "new": NEW_TOKENS}
        run_sparse = ours.decoding(cfg, options).run
        run_dense = ours.decoding(dense, options).run
        ratios = []
        for _ in range(rounds):
            # Side by side, so that a machine that slows down slows both.
            sparse_seconds = timed(run_sparse)
            ratios.append(sparse_seconds / timed(run_dense))
        figures[f"decode_ratio_{num_rows}"] = statistics.median(ratios)
    return figures


def timed(run: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def dense_twin(cfg: ModelConfig) -> ModelConfig:
    """Returns a dense model whose feed-forwards have the active width of the experts."""

    def dense(kinds: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("dense" for _ in kinds)

    active = round(flops.experts_per_token(cfg.moe) * cfg.moe.expert_hidden)
    # Shared experts serve every token, so their whole width is active.
    return dataclasses.replace(
        cfg,
        prefix=dense(cfg.prefix),
        period=dense(cfg.period),
        suffix=dense(cfg.suffix),
        ffn_hidden=active + cfg.moe.shared_width,
    )


MEASURES: dict[str, Callable[[Trained], dict[str, float]]] = {
    "prefix": prefix,
    "decoding": decoding,
}
