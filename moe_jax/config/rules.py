"""The rules that tie config keys to each other.

Each message names the keys, both values and the way out. What a component alone knows is in its
own file; here is what ties it to others.
"""

from collections.abc import Iterator

from moe_jax.config import causality
from moe_jax.errors import UserError
from moe_jax.models import MODELS
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe import sparse
from moe_jax.moe.dispatch import DISPATCHERS, LOSSLESS
from moe_jax.moe.losses import BALANCE, LOSSES
from moe_jax.moe.ordering import AS_LISTED, ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Setting, Sizes
from moe_jax.moe.sparse import RULES
from moe_jax.optim import schedules
from moe_jax.schema import options
from moe_jax.schema.blocks import BLOCKS
from moe_jax.schema.config import Config, MoEConfig
from moe_jax.schema.options import NOT_NEGATIVE, not_among
from moe_jax.tasks import TASKS


def check(c: Config) -> None:
    """Raises a UserError for the first rule that the config breaks."""
    for rules in (_bounds, _task, _model, _moe, _leak, _mesh, _batch, _train):
        for message in rules(c):
            raise UserError(message)


def _bounds(c: Config) -> Iterator[str]:
    """Every number of what travels on is within its bounds, every text one of its choices."""
    yield from options.refusals(c, "")
    for name, coefficient in c.model.moe.losses.items():
        yield from options.of_number(f"model.moe.losses.{name}", coefficient, NOT_NEGATIVE)
    for block, chosen in chosen_blocks(c):
        yield from options.refusals(chosen, f"{block}.")
    if TASKS[c.task].is_language:
        yield from options.of_sources(c.data.sources)


def chosen_blocks(c: Config) -> Iterator[tuple[str, object]]:
    """Yields (path of the block, frozen options) of everything that is chosen."""
    moe, optim = c.model.moe, c.optim
    yield f"tasks.{c.task}", c.task_options
    yield f"model.kinds.{c.model.kind}", c.model.kind_options
    yield f"model.attentions.{c.model.attention}", c.model.attention_options
    yield f"model.moe.routers.{moe.router}", moe.router_options
    yield f"model.moe.orderings.{moe.ordering}", moe.ordering_options
    yield f"model.moe.dispatchers.{moe.dispatcher}", moe.dispatcher_options
    yield f"model.moe.sparse.rules.{moe.sparse.rule}", moe.sparse.rule_options
    yield f"model.moe.sparse.patterns.{moe.sparse.pattern}", moe.sparse.pattern_options
    yield f"optim.optimizers.{optim.optimizer}", optim.options
    yield f"optim.schedules.{optim.schedule}", optim.schedule_options


def advice(c: Config) -> Iterator[str]:
    """Yields what a run is told at its start: what is allowed, and hardly ever meant."""
    if cut := schedules.warmup_note(c.optim):
        yield cut
    if c.model.param_dtype == "bfloat16" and not c.optim.master_copy:
        yield (
            "model.param_dtype = bfloat16 rounds away every update below 1/512 of a weight, so "
            "that at a small learning rate nothing is "
            "learned (docs/precision.md). Set optim.master_copy=True, or model.param_dtype=float32 "
            "and model.dtype=bfloat16"
        )
    if c.model.kind_options.masks:
        yield from ATTENTIONS[c.model.attention].advice(c)
    if c.model.num_moe_layers:
        yield from _of_router(c)
        if not DISPATCHERS[c.model.moe.dispatcher].drops:
            yield from _of_lossless(c.model.moe)


def _of_router(c: Config) -> Iterator[str]:
    """Losses that pull at a router in vain, or against its own balance; a gate without gradient."""
    moe = c.model.moe
    router = ROUTERS[moe.router]
    sizes = Sizes(c.model.d_model, moe.num_experts, c.model.vocab_size)
    learns = bool(router.params(sizes, moe.router_options))
    pulling = [name for name in _unwanted_losses(moe, learns) if moe.losses[name]]
    pulls = " and ".join(f"model.moe.losses.{name} = {moe.losses[name]}" for name in pulling)
    balanced_by = router.balanced_by(moe.router_options)
    if pulls and not learns:
        yield f"the router {moe.router} has no weights: {pulls} cannot change anything"
    elif pulls and balanced_by:
        yield (
            f"the router {moe.router} is balanced by {balanced_by}, and {pulls} on top of it pulls "
            "as well: 0 is its paper's"
        )
    declared = router.declared(moe.num_experts, moe.router_options)
    if learns and declared.most == 1 and declared.gate_sum is not None:
        yield (
            f"the router {moe.router} has one choice per token, and its gate is always "
            f"{declared.gate_sum:g}: the loss of the task cannot "
            f"teach it. Set model.moe.routers.{moe.router}.renormalize=False where it has that, or "
            "model.moe.router=switch"
        )


def _unwanted_losses(moe: MoEConfig, learns: bool) -> tuple[str, ...]:
    """Returns the losses that a router which balances itself, or cannot learn, has not in its
    paper.
    """
    if not learns:
        return tuple(LOSSES)
    router = ROUTERS[moe.router]
    return (*(name for name in BALANCE if name not in router.losses), *router.no_losses)


def _of_lossless(moe: MoEConfig) -> Iterator[str]:
    """What says who is dropped, or who shares room, does nothing where there is room for all."""
    ordering, dispatcher = ORDERINGS[moe.ordering], moe.dispatcher
    if ordering.sees_future and not ordering.always:
        yield (
            f'model.moe.ordering = "{moe.ordering}" says what is dropped first, and '
            f'model.moe.dispatcher = "{dispatcher}" drops nothing'
        )
    alone = not ROUTERS[moe.router].sees(moe.router_options).future and not ordering.always
    if moe.group_rows > 1 and alone:
        yield (
            f"model.moe.group_rows = {moe.group_rows} rows share capacity, and "
            f'model.moe.dispatcher = "{dispatcher}" has none to share'
        )


def _task(c: Config) -> Iterator[str]:
    task = TASKS[c.task]
    if c.model.kind not in task.kinds:
        yield (
            f'model.kind = "{c.model.kind}" cannot learn task = "{c.task}": choose one of '
            f"{', '.join(task.kinds)}"
        )
    if task.is_language and MODELS[c.model.kind].instruments:
        return
    instruments = (
        ("record.steps", c.record.steps.text),
        ("log.interference_every", c.log.interference_every),
    )
    for key, value in instruments:
        if value:
            yield (
                f'{key} = {value} looks into the language model (task "lm", model.kind "decoder") '
                "alone: leave it off"
            )


def _model(c: Config) -> Iterator[str]:
    m = c.model
    kind = MODELS[m.kind]
    for path, blocks in (("prefix", m.prefix), ("period", m.period), ("suffix", m.suffix)):
        for block in blocks:
            yield from not_among(f"model.{path}", block, BLOCKS)
    if m.stacks and not m.blocks:
        yield (
            "model.prefix, model.period x model.repeats and model.suffix make no block at all: a "
            "model needs one"
        )
    if m.kind_options.masks:
        yield from _attention(c)
    yield from kind.refusals(c)


def _attention(c: Config) -> Iterator[str]:
    """What the attention refuses of the config, and a mask of the kind of model that it has not."""
    m = c.model
    attention = ATTENTIONS[m.attention]
    yield from attention.refusals(c)
    for mask in m.kind_options.masks:
        if mask not in attention.masks:
            able = (name for name, one in ATTENTIONS.items() if mask in one.masks)
            yield (
                f'model.attention = "{m.attention}" has no mask "{mask}", which model.kind = '
                f'"{m.kind}" asks for here: set model.attention={" or ".join(able)}'
            )


def _moe(c: Config) -> Iterator[str]:
    e = c.model.moe
    if not c.model.num_moe_layers:
        return
    router, at = ROUTERS[e.router], f"model.moe.routers.{e.router}"
    k = getattr(e.router_options, "k", 1)
    if not 1 <= k <= e.num_experts:
        yield f"{at}.k ({k}) must lie between 1 and model.moe.num_experts ({e.num_experts})"
    setting = Setting(at, e.num_experts, c.train.batch_size, c.train.micro_batch_size)
    yield from router.refusals(e.router_options, setting)
    dispatcher = DISPATCHERS[e.dispatcher]
    if router.own_capacity and dispatcher.drops:
        yield (
            f'model.moe.router = "{e.router}" fixes the capacity of each expert itself; with '
            f'model.moe.dispatcher = "{e.dispatcher}" it '
            f"would be dropped a second time: set model.moe.dispatcher={LOSSLESS}"
        )
    yield from _slots(e)
    yield from sparse.refusals(c.model)
    yield from _losses(c)
    others = () if dispatcher.mixes else (LOSSLESS,)
    yield from not_among("eval.dispatcher", c.eval.dispatcher, ("same", *others, e.dispatcher))


def _slots(e: MoEConfig) -> Iterator[str]:
    """A router that mixes tokens into slots and a dispatcher of slots need each other, and there
    are no assignments to order.
    """
    mixes = bool(ROUTERS[e.router].num_slots(e.router_options))
    takes = DISPATCHERS[e.dispatcher].mixes
    of_slots = " or ".join(name for name, one in DISPATCHERS.items() if one.mixes)
    if mixes and not takes:
        yield (
            f'model.moe.router = "{e.router}" fills slots, which model.moe.dispatcher = '
            f'"{e.dispatcher}" knows nothing of: set it to {of_slots}'
        )
    if takes and not mixes:
        mixing = (name for name, one in ROUTERS.items() if one.num_slots(one.options()))
        yield (
            f'model.moe.dispatcher = "{e.dispatcher}" needs the slots of model.moe.router = '
            f'"{" or ".join(mixing)}"; "{e.router}" makes assignments'
        )
    if mixes and e.ordering != AS_LISTED:
        yield (
            f'model.moe.ordering = "{e.ordering}" orders assignments, and model.moe.router = '
            f'"{e.router}" makes none: set it to {AS_LISTED}'
        )


def _losses(c: Config) -> Iterator[str]:
    e = c.model.moe
    for name, loss in LOSSES.items():
        if e.losses[name] and loss.needs and loss.needs not in ROUTERS[e.router].sums:
            giving = [router for router, one in ROUTERS.items() if loss.needs in one.sums]
            yield (
                f"model.moe.losses.{name} = {e.losses[name]} needs a sum that model.moe.router = "
                f'"{e.router}" does not give: set it to 0, or choose {" or ".join(giving)}'
            )
    if not e.adaptive.rate:
        return
    if not any(e.losses[name] for name in BALANCE):
        yield (
            f"model.moe.adaptive.rate = {e.adaptive.rate} drives the weight of the balance losses, "
            "but all their coefficients are 0: "
            f"give one (of model.moe.losses: {', '.join(BALANCE)}), or set the rate to 0"
        )
    if not DISPATCHERS[e.dispatcher].drops:
        dropping = " or ".join(name for name, one in DISPATCHERS.items() if one.drops)
        yield (
            f"model.moe.adaptive.rate = {e.adaptive.rate} follows what is dropped for want of "
            "room, "
            f'and model.moe.dispatcher = "{e.dispatcher}" has room for all. Set '
            f"model.moe.dispatcher={dropping}, or the rate to 0"
        )


def _leak(c: Config) -> Iterator[str]:
    seen = causality.leaks(c.model)
    if c.model.allow_leak or not (seen.future or seen.batch):
        return
    what = "a later token" if seen.future else "another sequence"
    yield (
        f"{'; '.join(causality.reasons(c.model))}: in training {what} would change an earlier "
        "token's output, so the training loss of this "
        "causal model would be that of one that cannot be decoded (docs/routers.md has the "
        "measured leaks). Choose another, or set "
        "model.allow_leak=True"
    )


def _mesh(c: Config) -> Iterator[str]:
    m, mesh, e = c.model, c.mesh, c.model.moe
    batch = mesh.batch_devices
    needs = [("model.d_model", m.d_model, "mesh.data x mesh.expert", batch)]
    if m.kind_options.masks:
        needs.append(("model.num_heads", m.num_heads, "mesh.model", mesh.model))
        needs.append(("model.num_kv_heads", m.num_kv_heads, "mesh.model", mesh.model))
    if m.kind_options.embeds:
        needs.append(("model.vocab_size", m.vocab_size, "mesh.model", mesh.model))
    if m.num_dense_layers:
        needs.append(("model.ffn_hidden", m.ffn_hidden, "mesh.model", mesh.model))
    if m.num_moe_layers:
        needs.append(("model.moe.num_experts", e.num_experts, "mesh.expert", mesh.expert))
        needs.append(("model.moe.expert_hidden", e.expert_hidden, "mesh.model", mesh.model))
    if e.sparse.stored.block and mesh.model > 1:
        yield (
            f"mesh.model ({mesh.model}) must be 1 for experts stored as blocks "
            "(model.moe.sparse.stored), which it cannot split"
        )
    for path, value, axis, length in needs:
        if value % length:
            yield f"{path} ({value}) must be divisible by {axis} ({length})"


def _batch(c: Config) -> Iterator[str]:
    t, mesh = c.train, c.mesh
    devices = mesh.batch_devices
    if t.batch_size % t.micro_batch_size:
        yield (
            f"train.batch_size ({t.batch_size}) must be divisible by "
            f"train.micro_batch_size ({t.micro_batch_size})"
        )
    for path, rows in (
        ("train.micro_batch_size", t.micro_batch_size),
        ("eval.batch_size", c.eval.batch_size),
    ):
        if rows % devices:
            yield (
                f"{path} ({rows} rows) must be divisible by "
                f"mesh.data x mesh.expert ({mesh.data} x {mesh.expert})"
            )
        if c.model.num_moe_layers and (rows // devices) % c.model.moe.group_rows:
            yield (
                f"model.moe.group_rows ({c.model.moe.group_rows}) must divide the rows of one "
                "device "
                f"({rows // devices} = {path} {rows} / (mesh.data {mesh.data} x mesh.expert "
                f"{mesh.expert}))"
            )


def _train(c: Config) -> Iterator[str]:
    if c.profile and c.profile[0] >= c.train.steps:
        yield (
            f"profile = {c.profile[0]}:{c.profile[1]} begins after the last step "
            f"(train.steps = {c.train.steps}): nothing would be traced"
        )
    first = c.record.steps.first
    if first and first > c.train.steps:
        yield (
            f'record.steps = "{c.record.steps.text}" begins after the last step '
            f"(train.steps = {c.train.steps}): nothing would be recorded"
        )
    for pair in c.train.init_rename:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(name, str) for name in pair)
        ):
            yield (
                f"train.init_rename: {pair!r} is no pair of names, "
                'as in (("repeats/0", "prefix/0"),)'
            )
    if c.train.init_rename and not c.train.init_from:
        yield (
            "train.init_rename renames what train.init_from loads, and that is empty: "
            "name a run, or leave it alone"
        )
    zeros = c.model.moe.sparse
    rule = zeros.rule
    if c.optim.train_only and not zeros.dense and RULES[rule].moves:
        yield (
            f'model.moe.sparse.rule = "{rule}" changes experts after an update, and '
            f'optim.train_only = "{c.optim.train_only}" would not '
            'keep it from those that are frozen: set the rule to "static" or "none", or leave '
            "train_only empty"
        )
    if c.optim.master_copy and c.model.param_dtype != "bfloat16":
        yield (
            f"optim.master_copy = True does nothing: model.param_dtype = {c.model.param_dtype} "
            "needs no copy in float32. Set "
            "optim.master_copy=False, or model.param_dtype=bfloat16"
        )
