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
from jax import Array

from moe_jax import layout
from moe_jax.data.tokenizer import Decoder, Tokenizer
from moe_jax.decoding.draw import Dials, Settings, check, dials, draw
from moe_jax.models.decodable import for_decoding
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches, num_slots
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.runtime import stopping
from moe_jax.schema.config import ModelConfig

# Tokens drawn before the host looks at them: streaming is this coarse.
STEPS = 16
# Tokens of a row prefilled at once: bounds the memory of a long prompt, and the number of
# compilations.
PREFILL = 256
# Prompts decoded at once.
ROWS = 32
# The place of a token that a finished row did not draw.
NOTHING = -1

OnText = Callable[[int, str], None]
log = logging.getLogger(__name__)


class RowState(NamedTuple):
    """Holds what the device loop is told of each row: NumPy arrays on the host."""

    # Of the prompt: randomness folds it in.
    index_B: Any
    # The window's last token, and where it stands.
    id_B: Any
    position_B: Any
    # Tokens drawn so far.
    count_B: Any
    # Tokens that may still be drawn before the host must act; 0 = the row rests.
    room_B: Any


class Engine(NamedTuple):
    """Holds the functions that a sampler calls; they compile at first use, for each B, M and S."""

    # (B, M) -> caches, one a block.
    empty: Callable[..., list[Any]]
    # (weights, caches, id_BS, length_B, start) -> caches.
    prefill: Callable[..., list[Any]]
    # (weights, caches, rows, dials) -> (id_NB, caches).
    decode: Callable[..., tuple[Array, list[Any]]]


def make_sampler(
    model_cfg: ModelConfig, tokenizer: Tokenizer, context: int
) -> Callable[..., list[str]]:
    """Returns `sampler(params, router_state, prompts, settings, on_text=None) -> texts`, which are
    the continuations, without the prompts.

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
    # Prompts whose cut was told.
    told: set[str] = set()

    @jax.jit
    def unstack(weights):
        return tuple(layout.unstack(tree, model_cfg) for tree in weights)

    def sampler(
        params: Any,
        router_state: Any,
        prompts: Sequence[str],
        settings: Settings,
        on_text: OnText | None = None,
    ) -> list[str]:
        check(settings)
        weights = (params, router_state)
        # A cache belongs to one block, so decoding runs block by block.
        if model_cfg.scan:
            weights = unstack(weights)
        rows = []
        for i, prompt in enumerate(prompts):
            rows.append(Row(i, prompt, tokenizer, context, settings, on_text))
        _tell_cut(rows, prompts, told)
        longest = max((len(row.window) for row in rows), default=0)
        # The cache holds the longest row, or the context.
        length = min(context, cache_length(longest + settings.max_tokens))
        size = batch_size(len(rows))
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            generate(engine, weights, batch, size, length, settings)
        return [row.text for row in rows]

    return sampler


def batch_size(num_rows: int) -> int:
    """Returns how many rows are decoded at once: equally many on each device."""
    shape = jax.sharding.get_mesh().shape
    devices = math.prod(shape[axis] for axis in BATCH)
    wanted = min(max(num_rows, 1), ROWS)
    return math.ceil(wanted / devices) * devices


def generate(
    engine: Engine, weights: Any, rows: list["Row"], size: int, length: int, settings: Settings
) -> None:
    """Runs one batch of at most `size` rows to the end of each."""
    caches = engine.empty(size, length)
    # 1. All windows are written to the cache.
    caches = _prefill(engine, weights, caches, dict(enumerate(rows)), size)
    # 2. The devices draw STEPS tokens of each row, and the host takes them.
    while not all(row.ended for row in rows):
        stopping.check()
        state = _row_state(rows, size, length)
        id_NB, caches = engine.decode(weights, caches, state, dials(settings))
        for row, id_N in zip(rows, np.asarray(id_NB).T):
            row.take([int(i) for i in id_N if i != NOTHING])
        # Rows whose cache is full go on with the last half of it.
        full = {}
        for b, row in enumerate(rows):
            if not row.ended and len(row.window) > length:
                row.window = row.window[-max(length // 2, 1) :]
                full[b] = row
        caches = _prefill(engine, weights, caches, full, size)


def _prefill(
    engine: Engine, weights: Any, caches: list[Any], rows: Mapping[int, "Row"], size: int
) -> list[Any]:
    """Writes the windows of some rows (by their place in the batch) but for their last tokens;
    other rows stay as they are.
    """
    # The last token is fed by the loop, which draws what comes next.
    begun = {b: row.window[:-1] for b, row in rows.items()}
    longest = max((len(window) for window in begun.values()), default=0)
    # A power of two: few shapes are few compilations.
    step = min(PREFILL, power_of_two(longest, 16))
    for start in range(0, longest, step):
        id_BS = np.zeros((size, step), np.int32)
        length_B = np.zeros(size, np.int32)
        for b, window in begun.items():
            part = window[start : start + step]
            id_BS[b, : len(part)] = part
            length_B[b] = len(part)
        caches = engine.prefill(weights, caches, id_BS, length_B, np.int32(start))
    return caches


def _row_state(rows: list["Row"], size: int, length: int) -> RowState:
    """Returns what the loop is told of a batch; places without a row rest."""
    state = RowState(*(np.zeros(size, np.int32) for _ in RowState._fields))
    for b, row in enumerate(rows):
        # The window's last token is not in the cache yet: the loop feeds it.
        position = len(row.window) - 1
        state.index_B[b] = row.index
        state.id_B[b] = row.window[-1]
        state.position_B[b] = position
        state.count_B[b] = row.count
        # The cache has places for the positions below `length`.
        state.room_B[b] = 0 if row.ended else min(row.left, length - position)
    return state


def make_engine(cfg: ModelConfig, tokenizer: Tokenizer) -> Engine:
    """Returns the compiled parts of decoding a model, `cfg` in the loop layout.

    Called with the mesh set.
    """
    model = make_model(cfg)

    def at(x, *dims):
        return jax.sharding.reshard(x, P(BATCH, *dims))

    def empty(num_rows: int, length: int) -> list[Any]:
        return empty_caches(cfg, num_rows, length)

    def forward(weights: Any, caches: list[Any], id_BS, position_BS, valid_BS, index_B):
        # Padding is written behind the cache, which is nowhere.
        position_BS = jnp.where(valid_BS, position_BS, num_slots(caches))
        segment_BS = valid_BS.astype(jnp.int32)
        batch = Batch(
            id_BS=at(id_BS),
            position_BS=at(position_BS),
            segment_BS=at(segment_BS),
            row_B=at(index_B),
        )
        return model.bind(*weights).cached(batch, caches)

    def prefill(weights: Any, caches: list[Any], id_BS, length_B, start) -> list[Any]:
        place_1S = jnp.arange(id_BS.shape[1], dtype=jnp.int32)[None]
        position_BS = jnp.broadcast_to(start + place_1S, id_BS.shape)
        valid_BS = place_1S < length_B[:, None]
        # Nothing is drawn in a prefill, so any number of a row will do.
        row_B = jnp.arange(id_BS.shape[0], dtype=jnp.int32)
        return forward(weights, caches, id_BS, position_BS, valid_BS, row_B)[1]

    def decode(weights: Any, caches: list[Any], rows: RowState, dials: Dials):
        def step(carry):
            made, id_B, live_B, id_NB, caches = carry

            def column(x_B):
                return x_B[:, None]

            places = (column(id_B), column(rows.position_B + made), column(live_B))
            logits_B1V, caches = forward(weights, caches, *places, rows.index_B)
            # Whole on every device, so that all draw the same.
            logits_BV = jax.sharding.reshard(logits_B1V, P())[:, 0]
            # The embedding may have more ids than the tokenizer: these are never drawn.
            id_1V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)[None]
            logits_BV = jnp.where(id_1V < tokenizer.vocab_size, logits_BV, -jnp.inf)
            new_B = draw(logits_BV, rows.index_B, rows.count_B + made, dials)
            id_NB = id_NB.at[made].set(jnp.where(live_B, new_B, NOTHING))
            # A row rests after the boundary, or when its room is used up.
            live_B = live_B & (new_B != tokenizer.boundary_id) & (made + 1 < rows.room_B)
            return made + 1, new_B, live_B, id_NB, caches

        def goes_on(carry):
            made, _, live_B, _, _ = carry
            return (made < STEPS) & live_B.any()

        id_NB = jnp.full((STEPS, *rows.id_B.shape), NOTHING, jnp.int32)
        carry = (jnp.int32(0), rows.id_B, rows.room_B > 0, id_NB, caches)
        _, _, _, id_NB, caches = jax.lax.while_loop(goes_on, step, carry)
        return id_NB, caches

    return Engine(
        # Caches are donated to whoever writes to them: the new ones take their memory.
        jax.jit(empty, static_argnums=(0, 1)),
        jax.jit(prefill, donate_argnums=1),
        jax.jit(decode, donate_argnums=1),
    )


def power_of_two(n: int, least: int) -> int:
    """Returns the smallest power of two that is at least n and `least`.

    Few shapes are few compilations.
    """
    return 1 << (max(n, least) - 1).bit_length()


def cache_length(n: int) -> int:
    """Returns the slots of a cache for n tokens: the next of 64, 96, 128, 192, 256, 384, 512 ..

    Each step reads all slots, used or not, so powers of two alone would be too coarse.
    """
    whole = power_of_two(n, 64)
    three_quarters = whole // 4 * 3
    return three_quarters if 64 <= n <= three_quarters else whole


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
        self.index = index
        self.window = ids[-context:]
        # Tokens of the prompt that the model does not see.
        self.cut = max(len(ids) - context, 0)
        self.count, self.left = 0, settings.max_tokens
        self.ended, self.text = False, ""
        self._boundary, self._stop, self._on_text = tokenizer.boundary_id, settings.stop, on_text
        self._decoder = Decoder(tokenizer)
        # The text goes on from the prompt: a space in front of its first word belongs to it.
        self._decoder.feed(ids)
        # Text that may be the beginning of a stop string.
        self._held = ""

    def take(self, ids: list[int]) -> None:
        """Takes tokens that were drawn, in order; nothing may follow the boundary.

        What lies behind a stop string is lost.
        """
        if self.ended:
            return
        self.window += ids
        self.count += len(ids)
        self.left -= len(ids)
        last = self.left == 0 or ids[-1:] == [self._boundary]
        text = self._held + self._decoder.feed(ids)
        if last:
            text += self._decoder.finish()
        certain, self._held, stopped = split_at_stop(text, self._stop)
        self.ended = last or stopped
        if last and not stopped:
            # No stop string can be completed any more.
            certain += self._held
        self._give(certain)
        if self.ended and self._on_text:
            self._on_text(self.index, "")

    def _give(self, text: str) -> None:
        """Takes text that is certain, and passes it on to whoever streams it."""
        self.text += text
        if text and self._on_text:
            self._on_text(self.index, text)


def split_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """Returns (text before the stop string, text that may be the beginning of one, whether one has
    been found).

    The stop string that is complete first counts, so the result does not depend on how the text
    comes in pieces.
    """
    # (where it ends, where it begins) of each stop string.
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if found:
        _, start = min(found)
        return text[:start], "", True
    # Only the last characters of the text can be the beginning of a stop string.
    longest = max((len(s) for s in stop), default=1) - 1
    for start in range(max(len(text) - longest, 0), len(text)):
        if any(s.startswith(text[start:]) for s in stop):
            return text[:start], text[start:], False
    return text, "", False


def _tell_cut(rows: list[Row], prompts: Sequence[str], told: set[str]) -> None:
    """Says which prompts did not fit into the context, each once."""
    cut = [row for row in rows if row.cut and prompts[row.index] not in told]
    told.update(prompts[row.index] for row in cut)
    if cut and jax.process_index() == 0:
        which = ", ".join(f"{row.index + 1} (by {row.cut})" for row in cut[:8])
        if len(cut) > 8:
            which += ", ..."
        log.warning(
            "longer than the context of %d tokens, so that the model sees only its end: prompt %s",
            len(cut[0].window),
            which,
        )
