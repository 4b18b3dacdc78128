"""The leak detector against the labels: what is called safe does not leak at all, what is called
leaking does.

Here every router with its natural ordering, every ordering with one router, and groups of several
rows; `full`: all combinations.
"""

from pathlib import Path

import pytest
import tiny

from moe_jax import __main__, config
from moe_jax.config import causality, config_file
from moe_jax.instruments import leak
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS

# Labelled as leaking although these routers, with their default options, give an ordering nothing
# to order by: all gates are equal, and an
# expert is always a token's only choice (hash), or always its first or always its second (uniform).
STRICTER = {("hash", "batch_priority"), ("uniform", "batch_priority"), ("uniform", "k_major")}


def built(router="top_k", ordering="token_major", dispatcher=None, group_rows=1, **options):
    """The small config of a combination, with tight capacity; dispatcher None: the one that drops,
    if the router goes with it.
    """
    own = {"soft": "slots", "expert_choice": "dropless"}
    dispatcher = dispatcher or own.get(router, "capacity")
    chosen = {
        "model.moe.router": router,
        "model.moe.ordering": ordering,
        "model.moe.dispatcher": dispatcher,
    }
    chosen |= {f"model.moe.routers.{router}.{name}": value for name, value in options.items()}
    tight = {
        "model.moe.dispatchers.capacity.factor": leak.TIGHT,
        "model.moe.group_rows": group_rows,
    }
    return config.build(leak.shrink(tiny.raw(chosen | tight)), 1)


def check(cfg):
    """Safe: not the least change. Labelled: a change in training or in evaluation."""
    seen, found, moe = causality.sees(cfg.model), leak.measure(cfg), cfg.model.moe
    for kind in ("future", "batch"):
        deltas = [getattr(found[mode], kind).delta for mode in leak.MODES]
        if not getattr(seen, kind):
            assert deltas == [0, 0], (
                f"labelled as not seeing the {kind}, but its outputs change by {deltas}"
            )
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
    raw = tiny.raw(
        {"model.period": ("depth:dense",), "model.depth.capacity": 0.25, "model.allow_leak": True}
    )
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
    for cfg in leak.combinations(tiny.raw({"model.moe.group_rows": group_rows})):
        try:
            check(cfg)
        except AssertionError as error:
            moe = cfg.model.moe
            raise AssertionError(
                f"{moe.router}, {moe.ordering}, {moe.dispatcher}: {error}"
            ) from None


LEAKING = (
    "--config.model.moe.ordering=batch_priority",
    "--config.model.moe.dispatcher=capacity",
)


def leak_command(capsys, *flags, config="configs/base.py"):
    """(exit code, standard output, errors on standard error, where the progress is told too)"""
    code = __main__.main(["leak", "--config", config, *flags, "--markdown"])
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines(keepends=True) if not line.startswith("leak: ")]
    return code, out, "".join(errors)


def test_a_leak_that_is_not_allowed_is_an_exit_code(float64, capsys, monkeypatch):
    """Of use in a script:

    0 safe or allowed, 1 leaks and must not, 1 wrongly labelled though allowed.
    """
    assert leak_command(capsys)[0] == 0
    code, table, said = leak_command(capsys, *LEAKING)
    assert code == 1 and "leaks the future" in table
    assert (
        said.startswith("error: the config leaks the future, and model.allow_leak is False")
        and said.count("\n") == 1
    )
    allowed = (*LEAKING, "--config.model.allow_leak=True")
    code, table, said = leak_command(capsys, *allowed)
    assert code == 0 and "leaks the future" in table and not said
    honest = ORDERINGS["batch_priority"]
    monkeypatch.setitem(ORDERINGS, "batch_priority", honest._replace(sees_future=False))
    assert leak_command(capsys, *allowed)[0] == 1


def test_all_combinations_leak_on_purpose(float64, capsys, monkeypatch):
    """The table of --all ends with 0 whatever leaks as labelled, and with 1 for a wrong label."""
    leaking = built(ordering="batch_priority")
    monkeypatch.setattr(leak, "combinations", lambda raw: [leaking])
    assert leak_command(capsys, "--all")[:1] == (0,)
    monkeypatch.setattr(
        leak, "verdict", lambda cfg, found: "FAULT: labelled safe, but sees the future"
    )
    code, _, said = leak_command(capsys, "--all")
    assert code == 1 and said == "error: FAULT: labelled safe, but sees the future\n"


# Of every kind of model one config; the other variants differ in their data.
KINDS = (
    "vision.py",
    "classification.py",
    "translation.py",
    "translation.py:prefix",
    "recommendation.py",
    "speech.py",
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_is_measured(float64, name):
    raw = config_file.read(Path(f"configs/{name}"))
    cfg = config.build(leak.shrink(raw), 1)
    found = leak.measure(cfg, draws=1)
    assert leak.verdict(cfg, found) == "safe"
    assert any(found[mode].batch.delta for mode in leak.MODES) is False


@pytest.mark.parametrize("name", ["classification.py", "recommendation.py"])
def test_another_row_is_seen_in_every_kind_of_model(float64, name):
    """Two rows in a group of one tight capacity: what a row gets depends on the other."""
    router = "multi_gate" if name.startswith("recommendation") else "top_k"
    changes = {
        "model.moe.group_rows": 2,
        "model.moe.dispatcher": "capacity",
        "model.moe.dispatchers.capacity.factor": 0.5,
    }
    raw = config_file.read(Path(f"configs/{name}"), changes)
    cfg = config.build(leak.shrink(raw), 1)
    found = leak.measure(cfg)
    assert cfg.model.moe.router == router and found["train"].batch.delta > 0
    assert leak.verdict(cfg, found) == "leaks the batch"


def test_every_config_can_be_measured():
    """What shrinking makes of a config and its variants is one that the rules allow."""
    names = [
        f"{p.stem}.py" for p in Path("configs").glob("*.py") if p.stem not in ("__init__", "base")
    ]
    for name in (
        *names,
        "vision.py:fashion_mnist",
        "recommendation.py:movielens",
        "article.py:wordnet",
    ):
        config.build(leak.shrink(config_file.read(Path(f"configs/{name}"))), 1)
