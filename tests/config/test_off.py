"""What is switched off costs nothing and refuses nothing: coefficients of 0, instruments that
nobody asked for, idle keys.
"""

import numpy as np
import pytest
import tiny
from run_cases import losses, run
from suites import normal

from moe_jax import publish, train
from moe_jax.moe.losses import LOSSES
from moe_jax.moe.routing import ROUTERS

# A run of two steps without auxiliary losses.
UNAIDED = {f"model.moe.losses.{name}": 0.0 for name in LOSSES} | {
    "model.param_dtype": "float32",
    "model.dtype": "float32",
    "model.dropout": 0.0,
    "model.allow_leak": True,
    "data.seq_len": 8,
    "train.batch_size": 2,
    "train.steps": 2,
    "optim.ema_decay": 0.0,
}
# In every test run, one that is balanced by a bias and one that makes no assignments: each takes a
# compilation.
QUICKLY = ("sigmoid", "soft")
# `recorded` replays what another run did, and trains nothing of its own.
TRAINED = normal(QUICKLY, [name for name in ROUTERS if name != "recorded"])


@pytest.mark.parametrize("router", TRAINED)
def test_every_router_trains_without_auxiliary_losses(tmp_path, router):
    dispatcher = "slots" if router == "soft" else "dropless"
    choice = {"model.moe.router": router, "model.moe.dispatcher": dispatcher}
    assert run(tmp_path, UNAIDED | choice).step == 2
    assert all(np.isfinite(loss) for loss in losses(tmp_path).values())


def test_what_is_off_is_not_made(tmp_path, monkeypatch):
    """Without its option an instrument is not even built, so that it can neither refuse nor take
    time.
    """
    asked = []
    monkeypatch.setattr(train.interference, "make_meter", lambda *_: asked.append("meter"))
    monkeypatch.setattr(publish, "make_sampler", lambda *_: asked.append("sampler"))
    monkeypatch.setattr(train.record, "refuse_unrecordable", lambda *_: asked.append("record"))
    monkeypatch.setattr(train.LoadOverTime, "note", lambda *_: asked.append("load"))
    monkeypatch.setattr(train.flops, "measure_peak", lambda *_: asked.append("peak") or 1e12)
    few = UNAIDED | {"model.period": ("dense",), "log.histogram_every": 1}
    run(tmp_path, few)
    assert asked == ["peak"]
    run(tmp_path, few)  # nothing is left to train, so no speed is compared with the peak
    assert asked == ["peak"]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        # These models have no attention, whose heads would have to fit.
        ((1, 1, 2), {"model.kind": "article", "model.num_heads": 3, "model.num_kv_heads": 3}),
        (
            (1, 1, 1),
            {
                "model.kind": "article",
                "model.num_heads": 3,
                "model.num_kv_heads": 2,
                "model.head_dim": 5,
            },
        ),
        ((1, 1, 2), {"task": "recommendation", "model.kind": "mmoe", "model.num_kv_heads": 1}),
        # Vectors are projected: there is no vocabulary to split.
        (
            (1, 1, 2),
            {
                "task": "vision",
                "model.kind": "encoder",
                "model.kinds.encoder.inputs": "vectors",
                "model.vocab_size": 3,
            },
        ),
        # The sources are those of the language model.
        ((1, 1, 1), {"task": "vision", "model.kind": "encoder", "data.sources": ()}),
    ],
    ids=[
        "heads on a mesh",
        "odd heads",
        "heads of mmoe",
        "vocabulary of vectors",
        "sources of vision",
    ],
)
def test_no_rule_is_about_what_a_model_has_not(shape, changes):
    tiny.build(shape, changes)
