"""Texts, and what our own evaluation makes of them."""

import jax
import numpy as np

from moe_jax.data import pack
from moe_jax.data.batches import PackedText
from moe_jax.data.documents import Document
from moe_jax.parallel import batch_rows
from moe_jax.tasks import contract
from moe_jax.tasks.lm import task as lm

TEXTS = ["To be, or not to be.", "A rose by any other name\nwould smell as sweet.", "Hm"]


def judged_by_evaluation(run):
    """Nats and bytes of the texts, one row each, by the evaluation of training."""
    tokenizer, length = run.tokenizer, run.config.data.seq_len
    rows = [
        pack.pack(pack.encode([Document(text, "all")], tokenizer, ["all"]), length, tokenizer)
        for text in TEXTS
    ]
    fields = [np.concatenate(of).astype(np.int32) for of in zip(*(row[:4] for row in rows))]
    tokens_RS, targets_RS, segment_RS, domain_RS = fields
    # The boundary behind a text is not asked for.
    quiet_RS = np.zeros_like(tokens_RS)
    quiet_RS[np.arange(len(TEXTS)), (segment_RS > 0).sum(1) - 1] = 1
    position_RS, row_R = pack.positions(segment_RS), np.arange(len(TEXTS), dtype=np.int32)
    batch = PackedText(
        tokens_RS, targets_RS, segment_RS, position_RS, domain_RS, row_R, quiet_BS=quiet_RS
    )
    data = type("Data", (), {"domains": ("all",), "tokenizer": tokenizer})
    batch = batch_rows.put(batch, np.arange(len(TEXTS)), len(TEXTS))

    @jax.jit
    def sums_of(params, router_state, batch):
        model = run.functions.bind(params, router_state)
        return contract.evaluate(lm.TASK, model, batch, data)

    sums = sums_of(run.parameters, run.router_state, batch)
    return float(sums["nll"].sum()), float(sums["bytes"].sum())
