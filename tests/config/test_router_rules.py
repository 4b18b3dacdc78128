"""What the config refuses of the routers that assign over many tokens, what cannot be decoded, and
what the card says of slots.
"""

import pytest
import tiny

from moe_jax.decoding.sample import make_sampler
from moe_jax.errors import UserError
from moe_jax.models import decodable
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.plan import dispatch, flops


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"router": "soft", "dispatcher": "dropless"},
            'router = "soft" fills slots.*dispatcher = "dropless" knows nothing of',
        ),
        (
            {"dispatcher": "slots"},
            'dispatcher = "slots" needs the slots of model.moe.router = "soft"; "top_k" makes',
        ),
        (
            {"router": "soft", "dispatcher": "slots", "ordering": "k_major"},
            'ordering = "k_major" orders assignments',
        ),
        (
            {"router": "soft", "dispatcher": "slots", "routers.soft.slots": 0},
            "soft.slots = 0 must be at least 1",
        ),
        (
            {"router": "expert_choice", "dispatcher": "capacity"},
            "dropped a second time: set model.moe.dispatcher=dropless",
        ),
        (
            {"router": "expert_choice", "routers.expert_choice.factor": 9.0},
            r"factor = 9.0 must be at most .*\(8\)",
        ),
        (
            {"router": "base", "routers.base.gates": "tanh"},
            '"tanh" is not known: choose one of sigmoid, softmax',
        ),
        (
            {"router": "base", "routers.base.scope": "row"},
            '"row" is not known: choose one of group, batch',
        ),
        (
            {"router": "base", "routers.base.iterations": 0},
            "base.iterations = 0 must be at least 1",
        ),
        (
            {"router": "relu", "routers.relu.max_active": 1},
            r"max_active \(1\) must lie between .*relu.k \(2\) and .*\(8\)",
        ),
        ({"router": "relu", "routers.relu.alpha": 0.5}, "alpha = 0.5 must be at least 1"),
        ({"router": "relu", "routers.relu.l1": 0.0}, "relu.l1 = 0.0 must be at least 1e-20"),
        (
            {"router": "recorded", "routers.recorded.gates": "old"},
            '"old" is not known: choose one of recorded, router',
        ),
        (
            {"ordering": "rounding", "orderings.rounding.tile": 0},
            "rounding.tile = 0 must be at least 1",
        ),
    ],
)
def test_bad_options_are_refused_by_name(changes, message):
    changes = {f"model.moe.{name}": value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        tiny.build(changes=changes | {"model.allow_leak": True})


@pytest.mark.parametrize("router", ["expert_choice", "base", "soft"])
def test_a_causal_model_refuses_what_chooses_over_tokens(router):
    slots = {"model.moe.dispatcher": "slots"} if router == "soft" else {}
    with pytest.raises(
        UserError,
        match=f'"{router}" chooses over all tokens of a sequence.*set model.allow_leak=True',
    ):
        tiny.build(changes={"model.moe.router": router, **slots})


def test_balance_over_the_batch_is_refused_under_accumulation():
    changes = {
        "model.moe.router": "base",
        "model.moe.routers.base.scope": "batch",
        "model.allow_leak": True,
    }
    tiny.build(changes=changes)
    message = r"2 micro-batches \(train.batch_size 16 / train.micro_batch_size 8\) are not"
    with pytest.raises(UserError, match=message):
        tiny.build(changes=changes | {"train.micro_batch_size": 8})


SOFT = {"model.moe.router": "soft", "model.moe.dispatcher": "slots", "model.allow_leak": True}


def test_the_buffer_and_the_flops_of_slots_are_told():
    """8 rows x 4 slots x 8 experts on one of two devices.

    A row of 8 tokens costs 32 expert rows, and mixing 2 x 32 x 16 a token.
    """
    cfg = tiny.build((2, 1, 1), SOFT)
    assert dispatch.buffer_note(cfg).startswith("slots: 256 rows, ")
    forward = flops.forward_per_token(cfg.model, cfg.data.seq_len)
    assert (
        forward.experts == 2 * 2 * 3 * 16 * 16 * 32 / 8
    )  # layers, multiply-add, matrices, D, F, rows per token
    assert forward.router == 2 * 2 * (
        8 * 4 * 16 + 1 + 2 * 32 * 16
    )  # layers, multiply-add, phi, scale, mixing
    halved = tiny.build((2, 1, 1), SOFT | {"model.moe.group_rows": 2})
    assert flops.forward_per_token(halved.model, 8).experts == forward.experts / 2
    assert dispatch.buffer_note(halved).startswith("slots: 128 rows, ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SOFT, '"soft" chooses over all tokens of a sequence, at evaluation too'),
        (
            {"model.moe.router": "expert_choice", "model.allow_leak": True},
            '"expert_choice" chooses over all tokens',
        ),
        ({"model.moe.router": "recorded"}, "there is none of text that is yet to be written"),
    ],
)
def test_what_cannot_be_decoded_is_refused(changes, message):
    cfg = tiny.build(changes=changes).model
    with pytest.raises(UserError, match=f"cannot be decoded: .*{message}"):
        make_sampler(cfg, None, 8)


def test_base_is_decoded_greedily():
    cfg = tiny.build(changes={"model.moe.router": "base", "model.allow_leak": True}).model
    options = DISPATCHERS["dropless"].options(direct=True)
    assert decodable.for_decoding(cfg).moe.dispatcher_options == options


def test_soft_moe_has_no_other_dispatcher():
    with pytest.raises(
        UserError, match='"soft" fills slots, which the dispatcher "dropless" knows nothing of'
    ):
        decodable.with_dispatcher(tiny.build(changes=SOFT).model, "dropless")
    with pytest.raises(
        UserError, match=r'eval.dispatcher = "dropless" is not known: choose one of same, slots'
    ):
        tiny.build(changes=SOFT | {"eval.dispatcher": "dropless"})


@pytest.mark.parametrize(
    ("router", "changes", "message"),
    [
        ("switch", {"jitter": 1.5}, "jitter = 1.5 must be at least 0 and below 1"),
        ("noisy_top_k", {"min_noise": 0.0}, "min_noise = 0.0 must be at least 1e-06"),
        (
            "sigmoid",
            {"score": "tanh"},
            'score = "tanh" is not known: choose one of sigmoid, softmax',
        ),
        (
            "sigmoid",
            {"num_groups": 3},
            "num_experts (8) must be divisible by model.moe.routers.sigmoid.num_groups (3)",
        ),
        ("sigmoid", {"num_groups": 2, "top_groups": 3}, "top_groups (3) must lie between 1 and"),
        ("sigmoid", {"num_groups": 4, "k": 3}, "k (3) must not exceed the 2 experts of"),
        ("quantile", {"ema": 1.0}, "ema = 1.0 must be at least 0 and below 1"),
        ("quantile", {"bins": 1}, "bins = 1 must be at least 2"),
        ("cosine", {"temperature": 0.001}, "temperature (0.001) must be at least"),
        ("null", {"kind": "copy", "renormalize": "real"}, "would copy nothing"),
        ("null", {"num_null": 0}, "num_null = 0 must be at least 1"),
        ("random", {"k": 9}, "k (9) must lie between 1 and model.moe.num_experts (8)"),
    ],
)
def test_bad_options_are_refused(router, changes, message):
    changed = {f"model.moe.routers.{router}.{name}": value for name, value in changes.items()}
    with pytest.raises(UserError) as error:
        tiny.build(changes={"model.moe.router": router, **changed})
    assert message in str(error.value)
