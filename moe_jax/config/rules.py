"""The rules that tie config keys to each other.

Each message names the keys, both values and the way out.
"""

from collections.abc import Iterator

from moe_jax.config import bounds, causality, kinds
from moe_jax.errors import UserError
from moe_jax.moe import losses, sparse
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sizes
from moe_jax.optim import schedules
from moe_jax.schema.config import DEPTH, Config, MoEConfig, due


def check(c: Config) -> None:
    """Raises a UserError for the first rule that the config breaks."""
    for rules in (
        bounds.refusals,
        _task,
        _model,
        kinds.refusals,
        _moe,
        _leak,
        _mesh,
        _batch,
        _train,
    ):
        for message in rules(c):
            raise UserError(message)


# Routers that are balanced without a loss. A loss on top of it is another method than that of their
# papers.
BALANCED_BY = {
    "sigmoid": "its bias",
    "quantile": "its bias",
    "base": "its assignment",
    "expert_choice": "its capacity",
    "soft": "its slots",
    "relu": "its own L1 loss",
}


def advice(c: Config) -> Iterator[str]:
    """What a run is told at its start: allowed, and hardly ever meant."""
    if cut := schedules.warmup_note(c.optim):
        yield cut
    if c.model.param_dtype == "bfloat16" and not c.optim.master_copy:
        yield (
            "model.param_dtype = bfloat16 rounds away every update below 1/512 of a weight, so "
            "that at a small learning rate nothing is "
            "learned (docs/precision.md). Set optim.master_copy=True, or model.param_dtype=float32 "
            "and model.dtype=bfloat16"
        )
    if not c.model.num_moe_layers:
        return
    e = c.model.moe
    router = ROUTERS[e.router]
    declared = router.declared(e.num_experts, e.router_options)
    learns = bool(
        router.params(Sizes(c.model.d_model, e.num_experts, c.model.vocab_size), e.router_options)
    )
    pulls = " and ".join(
        f"model.moe.losses.{name} = {e.losses[name]}"
        for name in _pulls(e, learns)
        if e.losses[name]
    )
    if pulls and not learns:
        yield f"the router {e.router} has no weights: {pulls} cannot change anything"
    elif pulls and e.router in BALANCED_BY and e.router_options.get("bias_rate", 1):
        yield f"the router {e.router} is balanced by {BALANCED_BY[e.router]}, and {pulls} on top of it pulls as well: 0 is its paper's"
    if learns and declared.most == 1 and declared.gate_sum is not None:
        yield (
            f"the router {e.router} has one choice per token, and its gate is always "
            f"{declared.gate_sum:g}: the loss of the task cannot "
            f"teach it. Set model.moe.routers.{e.router}.renormalize=False where it has that, or "
            "model.moe.router=switch"
        )
    if e.dispatcher == "dropless":
        yield from _of_dropless(e)


def _of_dropless(e: MoEConfig) -> Iterator[str]:
    """What says who is dropped, or who shares room, where there is room for all."""
    if e.ordering in ("k_major", "batch_priority"):
        yield f'model.moe.ordering = "{e.ordering}" says what is dropped first, and model.moe.dispatcher = "dropless" drops nothing'
    alone = not ROUTERS[e.router].sees(e.router_options).future and e.ordering != "rounding"
    if e.group_rows > 1 and alone:
        yield f'model.moe.group_rows = {e.group_rows} rows share capacity, and model.moe.dispatcher = "dropless" has none to share'


def _pulls(e: MoEConfig, learns: bool) -> tuple[str, ...]:
    """The losses that a router which balances itself, or cannot learn, does not have in its paper."""
    if not learns:
        return (*losses.BALANCE, "z")
    more = ("z",) if e.router == "relu" else ()
    # DeepSeek-V3 keeps a small sequence-wise loss beside the bias.
    return (
        *(name for name in losses.BALANCE if (e.router, name) != ("sigmoid", "sequence_balance")),
        *more,
    )


def _choice(path: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f'{path} = "{value}" is not known: choose one of {", ".join(allowed)}'


# The models that can learn a task.
KINDS = {
    "lm": ("decoder", "article"),
    "classification": ("encoder", "article"),
    "translation": ("encdec",),
    "translation_prefix": ("decoder",),
    "vision": ("encoder",),
    "recommendation": ("mmoe",),
    "speech": ("encoder",),
}


def _task(c: Config) -> Iterator[str]:
    if c.model.kind not in KINDS[c.task]:
        yield f'model.kind = "{c.model.kind}" cannot learn task = "{c.task}": choose one of {", ".join(KINDS[c.task])}'
    if (c.task, c.model.kind) != ("lm", "decoder"):
        for key, value in (
            ("record.steps", c.record.steps),
            ("log.interference_every", c.log.interference_every),
        ):
            if value:
                yield f'{key} = {value} looks into the language model (task "lm", model.kind "decoder") alone: leave it off'


def _model(c: Config) -> Iterator[str]:
    m = c.model
    for path, blocks in (("prefix", m.prefix), ("period", m.period), ("suffix", m.suffix)):
        for block in blocks:
            yield from _choice(
                f"model.{path}", block, ("dense", "moe", DEPTH + "dense", DEPTH + "moe")
            )
    if not m.blocks and m.kind != "article":
        yield "model.prefix, model.period x model.repeats and model.suffix make no block at all: a model needs one"
    if m.attends and m.num_heads % m.num_kv_heads:
        yield f"model.num_heads ({m.num_heads}) must be divisible by model.num_kv_heads ({m.num_kv_heads})"
    if m.attends and m.head_dim % 2:
        yield f"model.head_dim ({m.head_dim}) must be even: rotary embeddings turn pairs"
    yield from _choice("model.activation", m.activation, ("swiglu", "gelu"))
    yield from _choice("model.remat", m.remat, ("none", "full", "dots", "dispatch"))
    for path, dtype in (("model.param_dtype", m.param_dtype), ("model.dtype", m.dtype)):
        yield from _choice(path, dtype, ("float32", "bfloat16", "float64"))


def _moe(c: Config) -> Iterator[str]:
    e = c.model.moe
    if not c.model.num_moe_layers:
        return
    yield from _choice("model.moe.router", e.router, tuple(ROUTERS))
    k = e.router_options.get("k", 1)
    if not 1 <= k <= e.num_experts:
        yield f"model.moe.routers.{e.router}.k ({k}) must lie between 1 and model.moe.num_experts ({e.num_experts})"
    yield from _router(e)
    if ROUTERS[e.router].own_capacity and e.dispatcher != "dropless":
        yield (
            f'model.moe.router = "{e.router}" fixes the capacity of each expert itself; with '
            f'model.moe.dispatcher = "{e.dispatcher}" it '
            "would be dropped a second time: set model.moe.dispatcher=dropless"
        )
    yield from _slots(e)
    if (
        e.router == "base"
        and e.router_options["scope"] == "batch"
        and c.train.num_micro_batches > 1
    ):
        yield (
            'model.moe.routers.base.scope = "batch" balances over all tokens at once, which '
            f"{c.train.num_micro_batches} micro-batches "
            f"(train.batch_size {c.train.batch_size} / train.micro_batch_size "
            f"{c.train.micro_batch_size}) are not: set "
            "train.micro_batch_size=0, or the scope to group"
        )
    yield from sparse.refusals(c.model)
    yield from _losses(c)
    others = () if e.router == "soft" else ("dropless",)
    yield from _choice("eval.dispatcher", c.eval.dispatcher, ("same", *others, e.dispatcher))


ROUTER_CHOICES = {
    ("top_k", "softmax"): ("before", "after"),
    ("sigmoid", "score"): ("sigmoid", "softmax"),
    ("sigmoid", "group_score"): ("top2", "max"),
    ("quantile", "score"): ("sigmoid", "softmax"),
    ("null", "kind"): ("zero", "copy"),
    ("null", "renormalize"): ("all", "real", "none"),
    ("base", "scope"): ("group", "batch"),
    ("base", "gates"): ("sigmoid", "softmax"),
    ("recorded", "gates"): ("recorded", "router"),
}


def _router(e: MoEConfig) -> Iterator[str]:
    """The values of the chosen router's options."""
    at, o = f"model.moe.routers.{e.router}", e.router_options
    for (router, name), allowed in ROUTER_CHOICES.items():
        if router == e.router:
            yield from _choice(f"{at}.{name}", o[name], allowed)
    if e.router == "cosine" and o["temperature"] < o["min_temperature"]:
        yield f"{at}.temperature ({o['temperature']}) must be at least {at}.min_temperature ({o['min_temperature']})"
    if e.router == "null" and o["kind"] == "copy" and o["renormalize"] == "real":
        yield (
            f'{at}.renormalize = "real" gives null choices no weight, so {at}.kind = "copy" would '
            'copy nothing: set renormalize to "all" '
            'or "none", or kind to "zero"'
        )
    if e.router == "sigmoid":
        yield from _expert_groups(e)
    if e.router == "relu" and not o["k"] <= o["max_active"] <= e.num_experts:
        yield (
            f"{at}.max_active ({o['max_active']}) must lie between {at}.k ({o['k']}) and "
            f"model.moe.num_experts ({e.num_experts})"
        )
    if e.router == "expert_choice" and o["factor"] > e.num_experts:
        yield f"{at}.factor = {o['factor']} must be at most model.moe.num_experts ({e.num_experts}): experts per token"


def _expert_groups(e: MoEConfig) -> Iterator[str]:
    at, o = f"model.moe.routers.{e.router}", e.router_options
    num, top = o["num_groups"], o["top_groups"]
    if e.num_experts % num:
        yield f"model.moe.num_experts ({e.num_experts}) must be divisible by {at}.num_groups ({num})"
    if top > num:
        yield f"{at}.top_groups ({top}) must lie between 1 and {at}.num_groups ({num})"
    if o["k"] > top * e.num_experts // num:
        yield (
            f"{at}.k ({o['k']}) must not exceed the {top * e.num_experts // num} experts of "
            f"{at}.top_groups ({top}) groups of "
            f"{e.num_experts // num}"
        )


def _slots(e: MoEConfig) -> Iterator[str]:
    """Soft MoE mixes tokens into slots: neither works with another partner, and there are no
    assignments to order.
    """
    if e.router == "soft" and e.dispatcher != "slots":
        yield f'model.moe.router = "soft" fills slots, which model.moe.dispatcher = "{e.dispatcher}" knows nothing of: set it to slots'
    if e.router != "soft" and e.dispatcher == "slots":
        yield f'model.moe.dispatcher = "slots" needs the slots of model.moe.router = "soft"; "{e.router}" makes assignments'
    if e.router == "soft" and e.ordering != "token_major":
        yield f'model.moe.ordering = "{e.ordering}" orders assignments, and model.moe.router = "soft" makes none: set it to token_major'


def _losses(c: Config) -> Iterator[str]:
    e = c.model.moe
    for name, routers in losses.ONLY.items():
        if e.losses[name] and e.router not in routers:
            yield (
                f"model.moe.losses.{name} = {e.losses[name]} needs a sum that model.moe.router = "
                f'"{e.router}" does not give: '
                f"set it to 0, or choose {' or '.join(routers)}"
            )
    if not e.adaptive["rate"]:
        return
    if not any(e.losses[name] for name in losses.BALANCE):
        yield (
            f"model.moe.adaptive.rate = {e.adaptive['rate']} drives the weight of the balance "
            "losses, but all their coefficients are 0: "
            f"give one (of model.moe.losses: {', '.join(losses.BALANCE)}), or set the rate to 0"
        )
    if e.dispatcher != "capacity":
        yield (
            f"model.moe.adaptive.rate = {e.adaptive['rate']} follows what is dropped for want of "
            "room, and model.moe.dispatcher = "
            f'"{e.dispatcher}" has room for all. Set model.moe.dispatcher=capacity, or the rate to '
            "0"
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
    if m.attends:
        needs.append(("model.num_heads", m.num_heads, "mesh.model", mesh.model))
        needs.append(("model.num_kv_heads", m.num_kv_heads, "mesh.model", mesh.model))
    if m.embeds:
        needs.append(("model.vocab_size", m.vocab_size, "mesh.model", mesh.model))
    if m.num_dense_layers:
        needs.append(("model.ffn_hidden", m.ffn_hidden, "mesh.model", mesh.model))
    if m.num_moe_layers:
        needs.append(("model.moe.num_experts", e.num_experts, "mesh.expert", mesh.expert))
        needs.append(("model.moe.expert_hidden", e.expert_hidden, "mesh.model", mesh.model))
    if e.sparse.stored["block"] and mesh.model > 1:
        yield f"mesh.model ({mesh.model}) must be 1 for experts stored as blocks (model.moe.sparse.stored), which it cannot split"
    for path, value, axis, length in needs:
        if value % length:
            yield f"{path} ({value}) must be divisible by {axis} ({length})"


def _batch(c: Config) -> Iterator[str]:
    t, mesh = c.train, c.mesh
    devices = mesh.batch_devices
    if t.batch_size % t.micro_batch_size:
        yield f"train.batch_size ({t.batch_size}) must be divisible by train.micro_batch_size ({t.micro_batch_size})"
    for path, rows in (
        ("train.micro_batch_size", t.micro_batch_size),
        ("eval.batch_size", c.eval.batch_size),
    ):
        if rows % devices:
            yield f"{path} ({rows} rows) must be divisible by mesh.data x mesh.expert ({mesh.data} x {mesh.expert})"
        if c.model.num_moe_layers and (rows // devices) % c.model.moe.group_rows:
            yield (
                f"model.moe.group_rows ({c.model.moe.group_rows}) must divide the rows of one "
                "device "
                f"({rows // devices} = {path} {rows} / (mesh.data {mesh.data} x mesh.expert "
                f"{mesh.expert}))"
            )


def _train(c: Config) -> Iterator[str]:
    if c.profile and c.profile[0] >= c.train.steps:
        yield f"profile = {c.profile[0]}:{c.profile[1]} begins after the last step (train.steps = {c.train.steps}): nothing would be traced"
    first = due(c.record.steps).first
    if first and first > c.train.steps:
        yield f'record.steps = "{c.record.steps}" begins after the last step (train.steps = {c.train.steps}): nothing would be recorded'
    for pair in c.train.init_rename:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(name, str) for name in pair)
        ):
            yield f'train.init_rename: {pair!r} is no pair of names, as in (("repeats/0", "prefix/0"),)'
    if c.train.init_rename and not c.train.init_from:
        yield "train.init_rename renames what train.init_from loads, and that is empty: name a run, or leave it alone"
    rule = c.model.moe.sparse.rule
    if c.optim.train_only and rule not in ("none", "static"):
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
    yield from _choice("optim.decay_mask", c.optim.decay_mask, ("matrices", "all", "none"))
