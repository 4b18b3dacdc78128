"""Runs that never were, for the page: routing that is drawn at random, with a structure that its
charts must show.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_jax.data.tokenizer.utf8 import bytes_tokenizer
from moe_jax.instruments.page.collect import Collected
from moe_jax.instruments.page.routing import Record

DOMAINS = ("verse", "prose")
TEXT = b"The quick brown fox </script> jumps over the lazy dog.\nAnd again, it does. "


def record(num_layers=3, num_tokens=600, num_experts=8, k=2, seed=0, shift=0) -> Record:
    """The first choice of a byte is a function of it in nine of ten tokens; no token goes to the
    last expert.
    """
    rng = np.random.default_rng(seed)
    token = np.frombuffer((TEXT * (num_tokens // len(TEXT) + 1))[:num_tokens], np.uint8)
    shape = (num_layers, num_tokens, k)
    expert = rng.integers(0, num_experts - 1, shape)
    own = (token.astype(int) * 5 + shift) % (num_experts - 1)
    keeps = rng.random((num_layers, num_tokens)) < 0.9
    expert[..., 0] = np.where(keeps, own[None], expert[..., 0])
    expert[..., 1] = (expert[..., 0] + 1 + expert[..., 1] % (num_experts - 2)) % (num_experts - 1)
    gate = np.sort(rng.random(shape), -1)[..., ::-1]
    position = np.arange(num_tokens) % 100
    row = np.arange(num_tokens) // 100
    domain = row % 2
    dropped = rng.random(shape) < 0.02
    return Record(expert, gate, dropped, token, position, domain, row, num_experts)


def collected(name="run", steps=(10, 20, 30), knockout=True, **of: Any) -> Collected:
    """A run with a record at each step; the last one is that of `of` and its seed."""
    seed = of.pop("seed", 0)
    records = [record(seed=seed + i, **of) for i in range(len(steps))]
    last = records[-1]
    num_layers = len(last.expert)
    moe = SimpleNamespace(
        num_experts=last.num_experts, expert_hidden=64, router="top_k", dispatcher="capacity"
    )
    model = SimpleNamespace(
        num_moe_layers=num_layers, blocks=("moe",) * num_layers, d_model=64, moe=moe
    )
    cfg = SimpleNamespace(model=model, seed=seed)
    run: Any = SimpleNamespace(workdir=Path("runs") / name, step=steps[-1], config=cfg)
    data: Any = SimpleNamespace(domains=DOMAINS, tokenizer=bytes_tokenizer())
    change = np.random.default_rng(1).normal(size=(num_layers, last.num_experts, 2)) / 50
    worth = {"way": "removed", "step": 30, "domains": list(DOMAINS), "change_LEZ": change.tolist()}
    curve = [(step, 3.0 - step / 50 + seed / 10) for step in range(0, 60, 5)]
    layers = [(step, layer, 1 + layer) for step in range(0, 60, 5) for layer in range(num_layers)]
    return Collected(
        run,
        name,
        {"train/nll": curve, "eval/bits_per_byte": curve[::4]},
        {"load_max": layers, "load_entropy": layers},
        list(steps),
        records,
        data,
        worth if knockout else None,
        ["a note"],
    )
