"""The leak detector against the labels: what is called safe does not leak at all, what is called leaking does.

Here every router with its natural ordering, every ordering with one router, and groups of several rows; `full`: all combinations.
"""

import models
import pytest

from moe_jax import __main__, config
from moe_jax.instruments import leak
from moe_jax.moe import causality
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS

# Labelled as leaking although these routers, with their default options, give an ordering nothing to order by: all gates are equal, and an
# expert is always a token's only choice (hash), or always its first or always its second (uniform).
STRICTER = {("hash", "batch_priority"), ("uniform", "batch_priority"), ("uniform", "k_major")}


def built(router="top_k", ordering="token_major", dispatcher=None, group_rows=1, **options):
    """The small config of a combination, with tight capacity; dispatcher None: the one that drops, if the router goes with it."""
    own = {"soft": "slots", "expert_choice": "dropless"}
    dispatcher = dispatcher or own.get(router, "capacity")
    chosen = {"model.moe.router": router, "model.moe.ordering": ordering, "model.moe.dispatcher": dispatcher}
    chosen |= {f"model.moe.routers.{router}.{name}": value for name, value in options.items()}
    tight = {"model.moe.dispatchers.capacity.factor": leak.TIGHT, "model.moe.group_rows": group_rows}
    return config.build(leak.shrink(models.raw(chosen | tight)), 1)


def check(cfg):
    """Safe: not the least change. Labelled: a change in training or in evaluation."""
    seen, found, moe = causality.sees(cfg.model), leak.measure(cfg), cfg.model.moe
    for kind in ("future", "batch"):
        deltas = [getattr(found[mode], kind).delta for mode in leak.MODES]
        if not getattr(seen, kind):
            assert deltas == [0, 0], f"labelled as not seeing the {kind}, but its outputs change by {deltas}"
        elif (moe.router, moe.ordering) not in STRICTER:
            assert max(deltas) > 1e-6, f"labelled as seeing the {kind}, but nothing changes"
    return seen, found


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_leaks_as_labelled(float64, router):
    check(built(router))


@pytest.mark.parametrize("dispatcher", ["capacity", "dropless"])
@pytest.mark.parametrize("ordering", [name for name in ORDERINGS if name != "token_major"])
def test_every_ordering_leaks_as_labelled(float64, ordering, dispatcher):
    check(built(ordering=ordering, dispatcher=dispatcher))


@pytest.mark.parametrize(
    ("router", "dispatcher", "options", "batch"),
    [
        ("top_k", "capacity", {}, True),
        ("top_k", "dropless", {}, False),
        ("expert_choice", "dropless", {}, True),
        ("base", "dropless", {"scope": "batch"}, True),
    ],
)
def test_rows_that_share_a_group_see_each_other(float64, router, dispatcher, options, batch):
    seen, found = check(built(router, dispatcher=dispatcher, group_rows=2, **options))
    assert seen.batch == batch == (found["train"].batch.delta > 0)


def test_depth_blocks_leak_in_training_only(float64):
    """Evaluation takes their causal rule."""
    raw = models.raw({"model.period": ("depth:dense",), "model.depth.capacity": 0.25, "model.allow_leak": True})
    seen, found = check(config.build(leak.shrink(raw), 1))
    assert seen.future and found["train"].future.delta > 0 == found["eval"].future.delta


def test_one_choice_in_k_major_order_is_token_major(float64):
    seen, _ = check(built("switch", "k_major"))
    assert not seen.future


def test_a_wrong_label_is_a_fault(float64, monkeypatch):
    """The measurement does not believe the label."""
    honest = ORDERINGS["batch_priority"]
    monkeypatch.setitem(ORDERINGS, "batch_priority", honest._replace(sees_future=False))
    cfg = built(ordering="batch_priority")
    assert leak.verdict(cfg, leak.measure(cfg)) == "FAULT: labelled safe, but sees the future"


@pytest.mark.full
@pytest.mark.parametrize("group_rows", [1, 2])
def test_all_combinations_leak_as_labelled(float64, group_rows):
    for cfg in leak.combinations(models.raw({"model.moe.group_rows": group_rows})):
        try:
            check(cfg)
        except AssertionError as error:
            moe = cfg.model.moe
            raise AssertionError(f"{moe.router}, {moe.ordering}, {moe.dispatcher}: {error}") from None


def test_the_command_prints_the_verdict(float64, capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import base\n\ndef get_config(arg=None):\n    c = base.get_config(arg)\n"
        "    c.model.moe.ordering = 'batch_priority'\n    c.model.moe.dispatcher = 'capacity'\n    return c\n"
    )
    assert __main__.main(["leak", "--config", str(file), "--markdown"]) == 0
    assert "leaks the future" in capsys.readouterr().out
