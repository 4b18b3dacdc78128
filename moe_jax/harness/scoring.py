"""How likely a language model finds texts: many of them, sorted by length and computed in batches.

Shapes: B rows, S tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.decoding.sample import power_of_two
from moe_jax.models.decodable import for_decoding
from moe_jax.models.functions import make_model
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.run import Run
from moe_jax.tasks.cross_entropy import negative_log_likelihood

# Rows are padded to a power of two, at least this: few shapes are few compilations.
LEAST = 16


class Request(NamedTuple):
    """Holds ids of a text, of which the last ones are judged."""

    context: Sequence[int]
    # At least one id.
    continuation: Sequence[int]


class Score(NamedTuple):
    """Holds what the model makes of a continuation."""

    # Natural logarithm of its probability, summed over its tokens in float64.
    log_likelihood: float
    # Each token of it is the likeliest one.
    is_greedy: bool


class Scorer:
    """Judges continuations with a trained model; nothing drops, as in decoding.

    Called with the mesh of the run set. Raises UserError for a model that cannot be decoded: what
    it makes of a token may depend on later ones.
    """

    def __init__(self, run: Run, batch_size: int):
        self._run, self._rows = run, batch_size
        self.context = run.config.data.seq_len
        model = make_model(for_decoding(run.config.model))

        def at(x: Array) -> Array:
            return jax.sharding.reshard(x, P(BATCH, *(None,) * (x.ndim - 1)))

        @jax.jit
        def judge(params: Any, router_state: Any, id_BS: Array, target_BS: Array, length_B: Array):
            place_1S = jnp.arange(id_BS.shape[1], dtype=jnp.int32)[None]
            batch = Batch(
                id_BS=at(id_BS),
                position_BS=at(jnp.broadcast_to(place_1S, id_BS.shape)),
                segment_BS=at((place_1S < length_B[:, None]).astype(jnp.int32)),
                row_B=at(jnp.arange(id_BS.shape[0], dtype=jnp.int32)),
            )
            logits_BSV, _ = model.bind(params, router_state)(batch, jax.random.key(0), False)
            target_BS = at(target_BS)
            log_BS = -negative_log_likelihood(logits_BSV, target_BS)
            return log_BS, logits_BSV.argmax(-1) == target_BS

        self._judge: Callable[..., tuple[Array, Array]] = judge

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Returns a score for each request, in their order.

        Of a text that is longer than a training row the last tokens are read.
        """
        rows = [self._row(request) for request in requests]
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        scores: list[Score | None] = [None] * len(rows)
        for batch in _batches(order, self._rows):
            for i, score in zip(batch, self._scores([rows[i] for i in batch])):
                scores[i] = score
        return [score for score in scores if score is not None]

    def _row(self, request: Request) -> tuple[list[int], list[int], int]:
        """Returns (ids, the id after each, how many of these are judged)."""
        # One more than a row: the last id is read by nobody, and only predicted.
        ids = [*request.context, *request.continuation][-(self.context + 1) :]
        return ids[:-1], ids[1:], min(len(request.continuation), len(ids) - 1)

    def _scores(self, rows: Sequence[tuple[list[int], list[int], int]]) -> Iterator[Score]:
        """Yields the scores of one batch."""
        longest = max(len(ids) for ids, _, _ in rows)
        # Padded, so that a few shapes serve all texts; a row of training is the longest.
        most = max(self.context, longest)
        shape = (self._rows, min(power_of_two(longest, LEAST), most))
        id_BS = np.zeros(shape, np.int32)
        target_BS = np.zeros(shape, np.int32)
        length_B = np.zeros(self._rows, np.int32)
        for b, (ids, targets, _) in enumerate(rows):
            length = len(ids)
            id_BS[b, :length] = ids
            target_BS[b, :length] = targets
            length_B[b] = length
        weights = self._run.judged, self._run.router_state
        log_BS, is_best_BS = self._judge(*weights, id_BS, target_BS, length_B)
        # Summed in float64, whatever the model computes in.
        log_BS, is_best_BS = np.asarray(log_BS, np.float64), np.asarray(is_best_BS)
        for b, (ids, _, num_judged) in enumerate(rows):
            # The continuation is at the end of the text.
            judged = slice(len(ids) - num_judged, len(ids))
            log_likelihood = float(log_BS[b, judged].sum())
            is_greedy = bool(is_best_BS[b, judged].all())
            yield Score(log_likelihood, is_greedy)


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(order), size):
        yield order[first : first + size]
