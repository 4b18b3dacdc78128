"""A component that is registered is all there is to do: what was never heard of before is
configured, refused, labelled, counted, proven and shown by what it declares.

Each test registers one that is written here. What would have to know its name is looked for in the
source at the end.
"""

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import router_cases
import router_suite
import tiny

import moe_jax
from moe_jax import config
from moe_jax.config import causality, tree
from moe_jax.data.sources import SOURCES
from moe_jax.errors import UserError
from moe_jax.instruments import leak
from moe_jax.models import MODELS, attention_core, decoder
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.contract import no_refusals
from moe_jax.models.rope_scalings import ROPE_SCALINGS
from moe_jax.moe.dispatch import DISPATCHERS, capacity
from moe_jax.moe.dispatch.contract import Dispatcher
from moe_jax.moe.losses import LOSSES
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import (
    Declared,
    Router,
    router_logits,
    sees_nothing,
    token_choice,
)
from moe_jax.moe.routing.statistics import statistics
from moe_jax.moe.sparse import RULES
from moe_jax.parallel import mesh
from moe_jax.plan import flops
from moe_jax.schema.blocks import KindOptions
from moe_jax.schema.options import COUNT, NUMBER, POSITIVE, option
from moe_jax.tasks import TASKS
from moe_jax.verify.run import Wanted, verify

PACKAGE = Path(moe_jax.__file__).parent


@dataclasses.dataclass(frozen=True)
class LeastOptions:
    k: int = option(2, "experts per token", NUMBER)


def least(params, state, tokens, *, cfg, rng, train):
    """Routes each token to the k experts of the smallest logits, with equal gates."""
    del state, rng, train
    router_logits_TE = router_logits(tokens.x_TD, params["gate"])
    gate_TK, expert_index_TK = jax.lax.top_k(jax.nn.softmax(-router_logits_TE), cfg.options.k)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
    sums = statistics(router_logits_TE, expert_index_TK, gate_TK, tokens)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)


def least_declared(num_experts, options):
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=1.0)


def least_refusals(options, setting):
    """Refuses to take every expert."""
    if options.k == setting.num_experts:
        yield f"{setting.at}.k ({options.k}) leaves no expert out"


LEAST = Router(LeastOptions, least, sees_nothing, least_declared, refusals=least_refusals)
CHOSEN = {"model.moe.router": "least"}


@pytest.fixture
def router(monkeypatch):
    monkeypatch.setitem(ROUTERS, "least", LEAST)
    monkeypatch.setitem(router_cases.CASES, "least", ("least", {"k": 3}))


def raw_with(tree_of_defaults, changes):
    """The tree of a small config, which has the blocks of what is registered now."""
    with tree_of_defaults.unlocked():
        tree_of_defaults.update_from_flattened_dict(
            {**tiny.TINY, "mesh.data": 1, "model.repeats": 1, **changes}
        )
    return tree_of_defaults.to_dict()


def build(changes):
    return config.build(raw_with(tree.defaults(), changes), 1)


def refused(changes):
    with pytest.raises(UserError) as error:
        build(changes)
    return str(error.value)


def test_a_router_is_configured_and_refused_by_what_it_declares(router):
    assert tree.defaults().model.moe.routers.least.k == 2
    assert "model.moe.routers.least.k" in {key.path for key in tree.keys()}
    cfg = build(CHOSEN | {"model.moe.routers.least.k": 3})
    assert cfg.model.moe.router_options == LeastOptions(k=3)
    at = "model.moe.routers.least"
    assert f"{at}.k = 0 must be at least 1" in refused(CHOSEN | {f"{at}.k": 0})
    assert "must lie between 1 and model.moe.num_experts (8)" in refused(CHOSEN | {f"{at}.k": 9})
    assert refused(CHOSEN | {f"{at}.k": 8}) == f"{at}.k (8) leaves no expert out"
    assert f"unknown key {at}.j" in refused_raw(f"{at}.j")


def refused_raw(path):
    """What is said of a key that the tree does not have."""
    raw = raw_with(tree.defaults(), CHOSEN)
    *parents, last = path.split(".")
    tree.at(raw, ".".join(parents))[last] = 1
    with pytest.raises(UserError) as error:
        config.build(raw, 1)
    return str(error.value)


def test_a_router_that_is_not_chosen_refuses_its_options(router):
    raw = raw_with(tree.defaults(), {"model.moe.routers.least.k": 3})
    with pytest.raises(UserError, match=r'routers.least.k = 3 does nothing, because .* is "top_k"'):
        config.refuse_unchosen(raw, tree.defaults().to_dict())


def test_a_router_is_held_to_what_it_promises(float64, router):
    router_suite.experts_of_a_token_are_distinct_and_as_many_as_declared("least")
    router_suite.gates_sum_as_declared("least")
    router_suite.sums_are_those_of_the_assignments("least")
    router_suite.padding_changes_nothing("least")
    router_suite.routing_is_the_same_on_a_mesh("least", (2, 2, 2))


def test_a_router_leaks_as_it_declares(float64, router):
    raw = raw_with(tree.defaults(), CHOSEN | {"model.moe.dispatcher": "capacity"})
    cfg = config.build(leak.shrink(raw), 1)
    assert not any(causality.sees(cfg.model))
    measured = leak.measure(cfg, draws=2)
    assert [measured[mode].future.delta for mode in leak.MODES] == [0, 0]
    assert [measured[mode].batch.delta for mode in leak.MODES] == [0, 0]


def test_the_flops_of_a_router_are_those_of_its_weights_and_choices(router):
    one, three = (build(CHOSEN | {"model.moe.routers.least.k": k}).model for k in (1, 3))
    like = build({"model.moe.routers.top_k.k": 3}).model
    assert flops.router(three) == three.d_model * three.moe.num_experts
    assert flops.forward_per_token(three, 8) == flops.forward_per_token(like, 8)
    assert flops.parameters(three) == flops.parameters(like)
    experts = (flops.forward_per_token(cfg, 8).experts for cfg in (one, three))
    assert next(experts) * 3 == next(experts)


@pytest.mark.full
def test_a_router_is_proven_on_a_mesh(float64, router, tmp_path):
    raw = raw_with(tree.defaults(), CHOSEN)
    said: list[str] = []
    found = verify(
        raw, Wanted([mesh.Lengths(expert=1, model=2)], 1, 1, False), tmp_path, said.append
    )
    assert found.proven, said


@dataclasses.dataclass(frozen=True)
class RoomOptions:
    factor: float = option(1.25, "as that of capacity", POSITIVE)
    places: int = option(0, "as that of capacity", COUNT)


ROOM = Dispatcher(
    RoomOptions,
    capacity.apply,
    capacity.rows,
    capacity.received,
    drops=True,
    overflow="the rest drops",
    roomy=capacity.roomy,
)


def test_a_dispatcher_that_drops_is_labelled_so(float64, monkeypatch):
    monkeypatch.setitem(DISPATCHERS, "room", ROOM)
    chosen = {"model.moe.dispatcher": "room"}
    assert not any(causality.sees(build(chosen).model))
    later = chosen | {"model.moe.ordering": "k_major"}
    said = refused(later)
    assert 'model.moe.ordering = "k_major" lets later tokens take the places of earlier' in said
    shared = refused(chosen | {"model.moe.group_rows": 2})
    assert "model.moe.group_rows = 2 sequences share the capacity of an expert" in shared
    assert causality.sees(build(later | {"model.allow_leak": True}).model).future
    build({"model.moe.ordering": "k_major"})  # what drops nothing has no places to take
    build(chosen | {"model.moe.adaptive.rate": 0.01, "model.moe.losses.balance": 0.01})
    without = refused({"model.moe.adaptive.rate": 0.01, "model.moe.losses.balance": 0.01})
    assert "room" in without.partition("Set model.moe.dispatcher=")[2]
    choice = chosen | {"model.moe.router": "expert_choice", "model.allow_leak": True}
    assert "would be dropped a second time" in refused(choice)
    # and it does leak, with the room that it has
    raw = raw_with(tree.defaults(), later | {"model.allow_leak": True})
    raw["model"]["moe"]["dispatchers"]["room"]["factor"] = leak.TIGHT
    measured = leak.measure(config.build(leak.shrink(raw), 1), draws=2)
    assert measured["train"].future.delta > 1e-6


@dataclasses.dataclass(frozen=True)
class PlainOptions(KindOptions):
    bidirectional_prefix: bool = option(False, "as that of a decoder")


def test_a_causal_kind_refuses_a_router_that_sees_the_future(monkeypatch):
    plain = decoder.KIND._replace(options=PlainOptions, refusals=no_refusals)
    lm = TASKS["lm"]
    monkeypatch.setitem(TASKS, "lm", lm._replace(kinds=(*lm.kinds, "plain")))
    chosen = {"model.kind": "plain", "model.moe.router": "expert_choice"}
    monkeypatch.setitem(MODELS, "plain", plain)
    build({"model.kind": "plain"})
    said = refused(chosen)
    assert '"expert_choice" chooses over all tokens of a sequence' in said
    assert "set model.allow_leak=True" in said.replace("Set", "set")
    monkeypatch.setitem(MODELS, "plain", plain._replace(causal=False))
    assert not any(causality.leaks(build(chosen).model))


@dataclasses.dataclass(frozen=True)
class AheadOptions:
    ahead: int = option(1, "later tokens that a token sees", NUMBER)


def ahead_keys(mask, segment_BS, prefix_BS, options):
    """A token sees one later token of its segment beside the earlier ones."""
    del mask, prefix_BS
    whole = attention_core.full(segment_BS)
    index_1S = jnp.arange(segment_BS.shape[1], dtype=jnp.int32)[None]
    return whole._replace(last_BT=jnp.minimum(whole.last_BT, index_1S + options.ahead))


def ahead_pairs(num_tokens, options):
    del options
    return num_tokens * (num_tokens + 3) // 2


AHEAD = ATTENTIONS["grouped_query"]._replace(
    options=AheadOptions,
    masks=("causal",),
    keys=ahead_keys,
    sees_future=True,
    num_pairs=ahead_pairs,
)


def test_an_attention_is_configured_refused_counted_and_labelled(float64, monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "ahead", AHEAD)
    assert tree.defaults().model.attentions.ahead.ahead == 1
    said = refused({"model.attention": "ahead"})
    assert 'model.attention = "ahead" sees later tokens: in training' in said
    chosen = {"model.attention": "ahead", "model.allow_leak": True}
    assert "model.attentions.ahead.ahead = 0 must be at least 1" in refused(
        chosen | {"model.attentions.ahead.ahead": 0}
    )
    full = chosen | {"model.kind": "encoder", "task": "classification"}
    assert 'model.attention = "ahead" has no mask "full"' in refused(full)
    cfg = build(chosen)
    assert causality.sees(cfg.model).future and not causality.sees(build({}).model).future
    scores = [flops.forward_per_token(c.model, 8).attention_scores for c in (cfg, build({}))]
    assert scores[0] * 36 == scores[1] * 44
    # And it does leak.
    small = leak.shrink(raw_with(tree.defaults(), chosen))
    measured = leak.measure(config.build(small, 1), draws=1)
    assert measured["train"].future.delta > 1e-6


# Names of components in the source, outside of their own file and of the registry.

CHOICES = {
    "router": set(ROUTERS),
    "ordering": set(tree.options_of("model.moe.ordering")),
    "dispatcher": set(DISPATCHERS),
    "kind": set(MODELS),
    "attention": set(ATTENTIONS),
    "rope_scaling": set(ROPE_SCALINGS),
    "task": set(TASKS),
    "rule": set(RULES),
    "pattern": set(tree.options_of("model.moe.sparse.pattern")),
    "optimizer": set(tree.options_of("optim.optimizer")),
    "schedule": set(tree.options_of("optim.schedule")),
    "source": set(SOURCES),
}
REGISTRIES = {
    "moe/routing/__init__.py",
    "moe/ordering/__init__.py",
    "moe/dispatch/__init__.py",
    "moe/losses/__init__.py",
    "moe/sparse/rules/__init__.py",
    "moe/sparse/patterns/__init__.py",
    "models/__init__.py",
    "models/attentions/__init__.py",
    "models/rope_scalings/__init__.py",
    "tasks/__init__.py",
    "optim/optimizers/__init__.py",
    "optim/schedules/__init__.py",
    "data/sources/__init__.py",
}
# What still knows a name. This list only shrinks: each says why, or what will take its place.
LEFT = {
    "moe/load.py": "sums of the layers, which two losses are made of and named like",
    "moe/routing/statistics.py": "sums of a router, which two losses are made of and named like",
}


def named(node):
    """The key of a choice that an expression asks for: of `cfg.moe.router`, `raw["router"]`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return node.slice.value
    return node.id if isinstance(node, ast.Name) else None


def texts(node):
    """The strings of a literal, or of a tuple, list or set of them."""
    inner = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {n.value for n in inner if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def comparisons(module):
    """(line, choice, names) of comparisons of a choice with the name of a component."""
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for choice in {named(side) for side in sides} & CHOICES.keys():
                if names := set().union(*map(texts, sides)) & CHOICES[choice]:
                    yield node.lineno, choice, names


def tables(module):
    """(line, choice, names) of dicts with two or more keys that are components of one registry."""
    for node in ast.walk(module):
        if isinstance(node, ast.Dict):
            keys = set().union(*(texts(key) for key in node.keys if key))
            for choice, known in (*CHOICES.items(), ("loss", set(LOSSES))):
                if len(keys & known) > 1:
                    yield node.lineno, choice, keys & known


def test_the_scan_finds_what_it_looks_for():
    source = """
if cfg.moe.router == "top_k": pass
if raw["kind"] in ("encoder", "mmoe"): pass
if cfg.kind == "compact": pass
TABLE = {"adamw": 1, "sgd": 2}
OTHER = {"adamw": 1, "loss": 2}
"""
    module = ast.parse(source)
    assert [line for line, *_ in comparisons(module)] == [2, 3]
    assert [(line, choice) for line, choice, _ in tables(module)] == [(5, "optimizer")]


def test_nothing_but_its_own_file_and_its_registry_knows_a_component_by_name():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if file in REGISTRIES:
            continue
        module = ast.parse(path.read_text(encoding="utf-8"))
        for line, choice, names in (*comparisons(module), *tables(module)):
            if names != {path.stem} and names != {path.parent.name}:
                found.setdefault(file, []).append(f"{file}:{line}: {choice} {sorted(names)}")
    assert found.keys() == LEFT.keys(), "\n".join(line for some in found.values() for line in some)
