"""Text from a model: batches of prompts, a key-value cache, and a decoding loop that stays on the
devices for STEPS tokens.

Every prompt begins with the tokenizer's boundary, as documents do in training, so an empty prompt
is a prompt too. A row's window is the tokens the model sees: prefill writes all but the last of
them to the cache, and each step feeds the last and draws the next. Padding is written nowhere (its
position lies behind the cache) and routed nowhere (its segment is 0), and decoding is dropless, so
that what a row says depends on nothing but the row. A full window goes on as a new one: its last
half, prefilled again.

The loop runs alike on every process: all see the same tokens, and nothing but the tokens decides
how it goes on.

Shapes: B rows, S tokens of a prefill, M length of the cache, N = STEPS, V vocabulary.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import layout
from moe_jax.data.tokenizer import Decoder, Tokenizer
from moe_jax.errors import UserError
from moe_jax.models.decodable import for_decoding
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches, num_slots
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.runtime import stopping
from moe_jax.schema.config import ModelConfig

STEPS = 16  # tokens drawn before the host looks at them: streaming is this coarse
# tokens of a row prefilled at once: bounds the memory of a long prompt, and the number of
# compilations
PREFILL = 256
ROWS = 32  # prompts decoded at once
NOTHING = -1  # the place of a token that a finished row did not draw

OnText = Callable[[int, str], None]
log = logging.getLogger(__name__)


class Settings(NamedTuple):
    max_tokens: int  # per prompt
    temperature: float  # 0 = greedy: always the likeliest token
    top_k: int  # draw from the k likeliest tokens; 0 = all
    top_p: float  # of these, from the fewest whose probability reaches p; 1 = all
    seed: int
    stop: tuple[str, ...]  # text that ends a row, and is not part of it


class RowState(NamedTuple):
    """Holds what the device loop is told of each row: NumPy arrays on the host."""

    index_B: Any  # of the prompt: randomness folds it in
    id_B: Any  # the window's last token
    position_B: Any  # and where it stands
    count_B: Any  # tokens drawn so far
    room_B: Any  # tokens that may still be drawn before the host must act; 0 = the row rests


class Dials(NamedTuple):
    """Settings that the device loop reads, as arguments: another value compiles nothing anew."""

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any


class Engine(NamedTuple):
    """Compiled at first use, for each B, M and S."""

    empty: Callable[..., list[Any]]  # (B, M) -> caches, one a block
    prefill: Callable[..., list[Any]]  # (weights, caches, id_BS, length_B, start) -> caches
    decode: Callable[
        ..., tuple[jax.Array, list[Any]]
    ]  # (weights, caches, rows, dials) -> (id_NB, caches)


def check(settings: Settings) -> None:
    """UserError for settings that mean nothing."""
    for name, value, fits, rule in (
        ("max_tokens", settings.max_tokens, settings.max_tokens >= 1, "at least 1"),
        (
            "temperature",
            settings.temperature,
            0 <= settings.temperature < math.inf,
            "at least 0 (0 is greedy)",
        ),
        ("top_k", settings.top_k, settings.top_k >= 0, "at least 0 (0 is off)"),
        ("top_p", settings.top_p, 0 < settings.top_p <= 1, "above 0 and at most 1 (1 is off)"),
        ("seed", settings.seed, 0 <= settings.seed < 2**32, "at least 0 and below 2**32"),
    ):
        if not fits:
            raise UserError(f"{name} = {value} must be {rule}")
    if "" in settings.stop:
        raise UserError("stop = '' is in every text: give a stop string that is not empty")


def make_sampler(
    model_cfg: ModelConfig, tokenizer: Tokenizer, context: int
) -> Callable[..., list[str]]:
    """`sampler(params, router_state, prompts, settings, on_text=None) -> texts`, the continuations,
    without the prompts.

    Args:
      model_cfg: of the parameters that the sampler will be given; stacked layers (scan) are copied
          into single ones, once a call.
      context: tokens of a training row, which the model never sees more of.

    Both are called with the mesh set, and the sampler by all processes. A text ends before the
    boundary token, before a stop string, or after max_tokens. `on_text(row, text)` is given each
    piece of text once it is certain, and "" when the row has ended.
    """
    cfg = for_decoding(model_cfg)
    engine = make_engine(cfg, tokenizer)
    unstack = jax.jit(lambda weights: tuple(layout.unstack(tree, model_cfg) for tree in weights))
    told: set[str] = set()

    def sampler(
        params: Any,
        router_state: Any,
        prompts: Sequence[str],
        settings: Settings,
        on_text: OnText | None = None,
    ) -> list[str]:
        check(settings)
        weights = (params, router_state)
        if model_cfg.scan:
            weights = unstack(weights)
        rows = [
            Row(i, prompt, tokenizer, context, settings, on_text)
            for i, prompt in enumerate(prompts)
        ]
        _tell_cut(rows, prompts, told)
        longest = max((len(row.window) for row in rows), default=0)
        length = min(context, power_of_two(longest + settings.max_tokens, 64))
        shape = jax.sharding.get_mesh().shape
        devices = math.prod(shape[axis] for axis in BATCH)
        size = -(-min(max(len(rows), 1), ROWS) // devices) * devices
        for first in range(0, len(rows), size):
            generate(engine, weights, rows[first : first + size], size, length, settings)
        return [row.text for row in rows]

    return sampler


def generate(
    engine: Engine, weights: Any, rows: list["Row"], size: int, length: int, settings: Settings
) -> None:
    """Runs one batch of at most `size` rows to the end of each."""
    caches = engine.empty(size, length)
    caches = _prefill(engine, weights, caches, dict(enumerate(rows)), size)
    while not all(row.ended for row in rows):
        stopping.check()
        state = _row_state(rows, size, length)
        id_NB, caches = engine.decode(weights, caches, state, dials(settings))
        for row, id_N in zip(rows, np.asarray(id_NB).T):
            row.take([int(i) for i in id_N if i != NOTHING])
        full = {b: row for b, row in enumerate(rows) if not row.ended and len(row.window) > length}
        for row in full.values():
            row.window = row.window[-max(length // 2, 1) :]
        caches = _prefill(engine, weights, caches, full, size)


def _prefill(
    engine: Engine, weights: Any, caches: list[Any], rows: Mapping[int, "Row"], size: int
) -> list[Any]:
    """Writes the windows of some rows (by their place in the batch) but for their last tokens;
    other rows stay as they are.
    """
    longest = max((len(row.window) - 1 for row in rows.values()), default=0)
    step = min(PREFILL, power_of_two(longest, 16))
    for start in range(0, longest, step):
        id_BS, length_B = np.zeros((size, step), np.int32), np.zeros(size, np.int32)
        for b, row in rows.items():
            part = row.window[:-1][start : start + step]
            id_BS[b, : len(part)], length_B[b] = part, len(part)
        caches = engine.prefill(weights, caches, id_BS, length_B, np.int32(start))
    return caches


def _row_state(rows: list["Row"], size: int, length: int) -> RowState:
    columns = np.zeros((len(RowState._fields), size), np.int32)
    for b, row in enumerate(rows):
        position = len(row.window) - 1
        room = 0 if row.ended else min(row.left, length - position)
        columns[:, b] = row.index, row.window[-1], position, row.count, room
    return RowState(*columns)


def dials(settings: Settings) -> Dials:
    top_k = np.int32(min(settings.top_k, 2**31 - 1))
    return Dials(
        np.float32(settings.temperature),
        top_k,
        np.float32(settings.top_p),
        np.uint32(settings.seed),
    )


def make_engine(cfg: ModelConfig, tokenizer: Tokenizer) -> Engine:
    """`cfg` in the loop layout. Called with the mesh set."""
    model = make_model(cfg)

    def at(x, *dims):
        return jax.sharding.reshard(x, P(BATCH, *dims))

    def empty(num_rows: int, length: int) -> list[Any]:
        return empty_caches(cfg, num_rows, length)

    def forward(weights: Any, caches: list[Any], id_BS, position_BS, valid_BS, index_B):
        position_BS = jnp.where(valid_BS, position_BS, num_slots(caches))
        batch = Batch(at(id_BS), at(position_BS), at(valid_BS.astype(jnp.int32)), at(index_B))
        return model.bind(*weights).cached(batch, caches)

    def prefill(weights: Any, caches: list[Any], id_BS, length_B, start) -> list[Any]:
        place_1S = jnp.arange(id_BS.shape[1], dtype=jnp.int32)[None]
        position_BS = jnp.broadcast_to(start + place_1S, id_BS.shape)
        row_B = jnp.arange(id_BS.shape[0], dtype=jnp.int32)
        return forward(weights, caches, id_BS, position_BS, place_1S < length_B[:, None], row_B)[1]

    def decode(weights: Any, caches: list[Any], rows: RowState, dials: Dials):
        def step(carry):
            made, id_B, live_B, id_NB, caches = carry

            def column(x_B):
                return x_B[:, None]

            places = (column(id_B), column(rows.position_B + made), column(live_B))
            logits_B1V, caches = forward(weights, caches, *places, rows.index_B)
            logits_BV = jax.sharding.reshard(logits_B1V, P())[:, 0]
            logits_BV = jnp.where(
                jnp.arange(logits_BV.shape[1])[None] < tokenizer.vocab_size, logits_BV, -jnp.inf
            )
            new_B = draw(logits_BV, rows.index_B, rows.count_B + made, dials)
            id_NB = id_NB.at[made].set(jnp.where(live_B, new_B, NOTHING))
            live_B = live_B & (new_B != tokenizer.boundary_id) & (made + 1 < rows.room_B)
            return made + 1, new_B, live_B, id_NB, caches

        id_NB = jnp.full((STEPS, *rows.id_B.shape), NOTHING, jnp.int32)
        carry = (jnp.int32(0), rows.id_B, rows.room_B > 0, id_NB, caches)
        carry = jax.lax.while_loop(lambda c: (c[0] < STEPS) & c[2].any(), step, carry)
        return carry[3], carry[4]

    return Engine(
        jax.jit(empty, static_argnums=(0, 1)),
        jax.jit(prefill, donate_argnums=1),
        jax.jit(decode, donate_argnums=1),
    )


def draw(logits_BV: jax.Array, row_B: jax.Array, count_B: jax.Array, dials: Dials) -> jax.Array:
    """The next token of each row, int32 [B].

    The key is (seed, row, tokens drawn), so no row changes another's text.
    """

    def greedy(_) -> jax.Array:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)

    def sampled(key: jax.Array) -> jax.Array:
        keys_B = jax.vmap(
            lambda row, count: jax.random.fold_in(jax.random.fold_in(key, row), count)
        )(row_B, count_B)
        noise_BV = jax.vmap(
            lambda key: jax.random.gumbel(key, logits_BV.shape[1:], logits_BV.dtype)
        )(keys_B)
        temperature = jnp.maximum(dials.temperature, 1e-6).astype(logits_BV.dtype)
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
        some = (dials.top_k > 0) | (dials.top_p < 1)

        def keep(x_BV):
            return keep_likely(x_BV, dials.top_k, dials.top_p)

        kept_BV = jax.lax.cond(some, keep, lambda x_BV: x_BV, scaled_BV)
        return jnp.argmax(kept_BV + noise_BV, -1).astype(jnp.int32)

    return jax.lax.cond(dials.temperature > 0, sampled, greedy, jax.random.key(dials.seed))


def keep_likely(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits of the tokens that may be drawn, -inf for the others.

    First the `top_k` likeliest (Fan et al. 2018, arXiv:1805.04833), then, of their renormalised
    distribution, the fewest that reach `top_p` together (Holtzman et al. 2020, arXiv:1904.09751),
    at least one. Tokens that tie with the last one kept are kept too.
    """
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_1V = jnp.arange(logits_BV.shape[1])[None]
    likely_1V = (top_k == 0) | (rank_1V < top_k)
    probs_BV = jax.nn.softmax(jnp.where(likely_1V, sorted_BV, -jnp.inf))
    before_BV = jnp.cumsum(probs_BV, -1) - probs_BV
    nucleus_BV = (before_BV < top_p) | (rank_1V == 0) | (top_p >= 1)
    last_B1 = jnp.where(likely_1V & nucleus_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)


def power_of_two(n: int, least: int) -> int:
    """The smallest power of two that is at least n and `least`: few shapes are few compilations."""
    return 1 << (max(n, least) - 1).bit_length()


class Row:
    """One prompt on the host: the tokens that the model sees, and the text it made."""

    def __init__(
        self,
        index: int,
        prompt: str,
        tokenizer: Tokenizer,
        context: int,
        settings: Settings,
        on_text: OnText | None,
    ):
        ids = [tokenizer.boundary_id, *(int(i) for i in tokenizer.encode(prompt))]
        self.index, self.window, self.cut = index, ids[-context:], max(len(ids) - context, 0)
        self.count, self.left, self.ended, self.text = 0, settings.max_tokens, False, ""
        self._boundary, self._stop, self._on_text = tokenizer.boundary_id, settings.stop, on_text
        self._decoder = Decoder(tokenizer)
        self._decoder.feed(
            ids
        )  # the text goes on from the prompt: a space in front of its first word belongs to it
        self._held = ""

    def take(self, ids: list[int]) -> None:
        """Tokens that were drawn, in order; nothing may follow the boundary.

        What lies behind a stop string is lost.
        """
        if self.ended:
            return
        self.window += ids
        self.count, self.left = self.count + len(ids), self.left - len(ids)
        last = self.left == 0 or ids[-1:] == [self._boundary]
        text = self._held + self._decoder.feed(ids) + (self._decoder.finish() if last else "")
        certain, self._held, stopped = split_at_stop(text, self._stop)
        self.ended = last or stopped
        self._give(certain + self._held if last and not stopped else certain)
        if self.ended and self._on_text:
            self._on_text(self.index, "")

    def _give(self, text: str) -> None:
        self.text += text
        if text and self._on_text:
            self._on_text(self.index, text)


def split_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """(text before the stop string, text that may be the beginning of one, has one been found).

    The stop string that is complete first counts, so the result does not depend on how the text
    comes in pieces.
    """
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if found:
        return text[: min(found)[1]], "", True
    longest = max((len(s) for s in stop), default=1) - 1
    ends = (len(text) - n for n in range(min(longest, len(text)), 0, -1))
    start = next((i for i in ends if any(s.startswith(text[i:]) for s in stop)), len(text))
    return text[:start], text[start:], False


def _tell_cut(rows: list[Row], prompts: Sequence[str], told: set[str]) -> None:
    """Says which prompts did not fit into the context, each once."""
    cut = [row for row in rows if row.cut and prompts[row.index] not in told]
    told.update(prompts[row.index] for row in cut)
    if cut and jax.process_index() == 0:
        which = ", ".join(f"{row.index + 1} (by {row.cut})" for row in cut[:8]) + (
            ", ..." if len(cut) > 8 else ""
        )
        log.warning(
            "longer than the context of %d tokens, so that the model sees only its end: prompt %s",
            len(cut[0].window),
            which,
        )
