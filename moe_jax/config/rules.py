"""The rules that tie config keys to each other.

Each message names the keys, both values and the way out. What a component alone knows is in its
own file; here is what ties it to others.
"""

from collections.abc import Iterator

from moe_jax.config import causality, meshes
from moe_jax.errors import UserError
from moe_jax.models import MODELS
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.block import kind_refusals
from moe_jax.models.rope_scalings import ROPE_SCALINGS
from moe_jax.moe import sparse
from moe_jax.moe.dispatch import DISPATCHERS, LOSSLESS
from moe_jax.moe.experts import narrow
from moe_jax.moe.losses import BALANCE, LOSSES
from moe_jax.moe.ordering import AS_LISTED
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Setting
from moe_jax.moe.sparse import RULES
from moe_jax.schema import options
from moe_jax.schema.blocks import attention_of, without_attention
from moe_jax.schema.config import NAMED_REMAT, REMAT_NAMES, Config, MoEConfig
from moe_jax.schema.options import NOT_NEGATIVE, not_among
from moe_jax.tasks import TASKS


def enforce(cfg: Config) -> None:
    """Raises a UserError for the first rule that the config breaks."""
    # Bounds come first: the rules after them divide by numbers that must not be 0.
    for rules in (
        _bounds,
        _task,
        _model,
        _moe,
        _leak,
        meshes.axes,
        meshes.pipeline,
        _batch,
        _train,
    ):
        for message in rules(cfg):
            raise UserError(message)


def _bounds(cfg: Config) -> Iterator[str]:
    """Yields what is out of its bounds, or none of its choices, of all that travels on."""
    yield from options.refusals(cfg, "")
    for name, coefficient in cfg.model.moe.losses.items():
        # The losses have no dataclass that could declare their bounds.
        yield from options.of_number(f"model.moe.losses.{name}", coefficient, NOT_NEGATIVE)
    for block, chosen in chosen_blocks(cfg):
        yield from options.refusals(chosen, f"{block}.")
    if TASKS[cfg.task].is_language:
        yield from options.of_sources(cfg.data.sources)


def chosen_blocks(cfg: Config) -> Iterator[tuple[str, object]]:
    """Yields (path of the block, frozen options) of everything that is chosen."""
    moe, optim = cfg.model.moe, cfg.optim
    yield f"tasks.{cfg.task}", cfg.task_options
    yield f"model.kinds.{cfg.model.kind}", cfg.model.kind_options
    yield f"model.attentions.{cfg.model.attention}", cfg.model.attention_options
    for name, chosen in cfg.model.block_attentions:
        yield f"model.attentions.{name}", chosen
    yield f"model.rope_scalings.{cfg.model.rope_scaling}", cfg.model.rope_scaling_options
    yield f"model.activations.{cfg.model.activation}", cfg.model.activation_options
    yield f"model.moe.routers.{moe.router}", moe.router_options
    yield f"model.moe.orderings.{moe.ordering}", moe.ordering_options
    yield f"model.moe.dispatchers.{moe.dispatcher}", moe.dispatcher_options
    yield f"model.moe.sparse.rules.{moe.sparse.rule}", moe.sparse.rule_options
    yield f"model.moe.sparse.patterns.{moe.sparse.pattern}", moe.sparse.pattern_options
    yield f"optim.optimizers.{optim.optimizer}", optim.options
    yield f"optim.schedules.{optim.schedule}", optim.schedule_options


def _task(cfg: Config) -> Iterator[str]:
    task = TASKS[cfg.task]
    if cfg.model.kind not in task.kinds:
        yield (
            f'model.kind = "{cfg.model.kind}" cannot learn task = "{cfg.task}": choose one of '
            f"{', '.join(task.kinds)}"
        )
    if task.is_language and MODELS[cfg.model.kind].instruments:
        return
    instruments = (
        ("record.steps", cfg.record.steps.text),
        ("log.interference_every", cfg.log.interference_every),
    )
    for key, value in instruments:
        if value:
            yield (
                f'{key} = {value} looks into the language model (task "lm", model.kind "decoder") '
                "alone: leave it off"
            )


def _model(cfg: Config) -> Iterator[str]:
    model = cfg.model
    kind = MODELS[model.kind]
    for part in ("prefix", "period", "suffix"):
        for block in getattr(model, part):
            yield from kind_refusals(f"model.{part}", block)
            if attention_of(block) and not model.kind_options.masks:
                yield (
                    f'model.{part} names an attention, "{block}", and model.kind = "{model.kind}" '
                    f'has none: write "{without_attention(block)}"'
                )
    if model.stacks and not model.blocks:
        yield (
            "model.prefix, model.period x model.repeats and model.suffix make no block at all: a "
            "model needs one"
        )
    if model.logit_cap and not kind.caps_logits:
        yield (
            f"model.logit_cap = {model.logit_cap} does nothing, because model.kind = "
            f'"{model.kind}" has a head of its own: leave the key alone'
        )
    if model.remat_offload and model.remat not in NAMED_REMAT:
        yield (
            f"model.remat_offload = True keeps nothing in the host's memory, because model.remat = "
            f'"{model.remat}" names nothing: set model.remat={" or ".join(REMAT_NAMES)}'
        )
    if model.ffn_numbers != narrow.FULL:
        yield from _narrow_numbers(cfg)
    if model.kind_options.masks:
        yield from _attention(cfg)
    yield from kind.refusals(cfg)


def _narrow_numbers(cfg: Config) -> Iterator[str]:
    """Yields what has no products of narrow numbers."""
    model, stored = cfg.model, cfg.model.moe.sparse.stored
    given = f'model.ffn_numbers = "{model.ffn_numbers}"'
    if not model.stacks:
        yield (
            f'{given} does nothing with model.kind = "{model.kind}", which has no blocks: leave '
            "the key alone"
        )
    if not model.num_moe_layers:
        return
    if stored.block:
        yield (
            f"{given} does not go with experts stored as blocks (model.moe.sparse.stored.block = "
            f"{stored.block}): set model.ffn_numbers=full"
        )
    # Each device would round its own columns by their own largest number.
    if cfg.mesh.model > 1:
        yield (
            f"{given} needs the whole hidden row of an expert on one device, and mesh.model "
            f"({cfg.mesh.model}) splits it: set mesh.model=1, or model.ffn_numbers=full"
        )


def _attention(cfg: Config) -> Iterator[str]:
    """Yields what the attentions of the blocks refuse, and options that do nothing."""
    model = cfg.model
    for name in dict.fromkeys(model.attentions):
        yield from _one_attention(cfg, name)
    at, scaling = f"model.rope_scalings.{model.rope_scaling}", ROPE_SCALINGS[model.rope_scaling]
    yield from scaling.refusals(model.rope_scaling_options, at, model.rope_theta)
    if model.qk_norm_over == "width" and not model.qk_norm:
        yield (
            'model.qk_norm_over = "width" does nothing, because model.qk_norm is False: set '
            "model.qk_norm=True, or leave the key alone"
        )


def _one_attention(cfg: Config, name: str) -> Iterator[str]:
    """Yields what an attention refuses, and a mask of the kind of model that it does not have."""
    model, attention = cfg.model, ATTENTIONS[name]
    yield from attention.refusals(cfg, name)
    for mask in model.kind_options.masks:
        if mask not in attention.masks:
            able = (other for other, one in ATTENTIONS.items() if mask in one.masks)
            yield (
                f'model.attention = "{name}" has no mask "{mask}", which model.kind = '
                f'"{model.kind}" asks for here: set model.attention={" or ".join(able)}'
            )


def _moe(cfg: Config) -> Iterator[str]:
    moe = cfg.model.moe
    if not cfg.model.num_moe_layers:
        return
    router, at = ROUTERS[moe.router], f"model.moe.routers.{moe.router}"
    # Not every router has the option k.
    k = getattr(moe.router_options, "k", 1)
    if not 1 <= k <= moe.num_experts:
        yield f"{at}.k ({k}) must lie between 1 and model.moe.num_experts ({moe.num_experts})"
    # What a router may refuse by, beside its own options.
    setting = Setting(at, moe.num_experts, cfg.train.batch_size, cfg.train.micro_batch_size)
    yield from router.refusals(moe.router_options, setting)
    for name in ("shared_hidden", "shared_gate"):
        if getattr(moe, name) and not moe.shared_experts:
            yield (
                f"model.moe.{name} = {getattr(moe, name)} does nothing, because "
                "model.moe.shared_experts is 0: set model.moe.shared_experts=1, or leave the key "
                "alone"
            )
    dispatcher = DISPATCHERS[moe.dispatcher]
    # An expert that chooses its tokens takes as many as it has places.
    if router.own_capacity and dispatcher.drops:
        yield (
            f'model.moe.router = "{moe.router}" fixes the capacity of each expert itself; with '
            f'model.moe.dispatcher = "{moe.dispatcher}" it '
            f"would be dropped a second time: set model.moe.dispatcher={LOSSLESS}"
        )
    yield from _slots(moe)
    yield from sparse.refusals(cfg.model)
    yield from _losses(cfg)
    # A dispatcher of slots takes no assignments, so no other one can evaluate the model.
    others = () if dispatcher.mixes else (LOSSLESS,)
    yield from not_among("eval.dispatcher", cfg.eval.dispatcher, ("same", *others, moe.dispatcher))


def _slots(moe: MoEConfig) -> Iterator[str]:
    """Yields what does not go with slots.

    A router that mixes tokens into slots and a dispatcher of slots need each other, and there are
    no assignments to order.
    """
    mixes = bool(ROUTERS[moe.router].num_slots(moe.router_options))
    takes_slots = DISPATCHERS[moe.dispatcher].mixes
    if mixes and not takes_slots:
        of_slots = " or ".join(name for name, one in DISPATCHERS.items() if one.mixes)
        yield (
            f'model.moe.router = "{moe.router}" fills slots, which model.moe.dispatcher = '
            f'"{moe.dispatcher}" knows nothing of: set it to {of_slots}'
        )
    if takes_slots and not mixes:
        mixing = " or ".join(name for name, one in ROUTERS.items() if one.num_slots(one.options()))
        yield (
            f'model.moe.dispatcher = "{moe.dispatcher}" needs the slots of model.moe.router = '
            f'"{mixing}"; "{moe.router}" makes assignments'
        )
    # Mixtures compete for no places.
    if mixes and moe.ordering != AS_LISTED:
        yield (
            f'model.moe.ordering = "{moe.ordering}" orders assignments, and model.moe.router = '
            f'"{moe.router}" makes none: set it to {AS_LISTED}'
        )


def _losses(cfg: Config) -> Iterator[str]:
    moe = cfg.model.moe
    for name, loss in LOSSES.items():
        if moe.losses[name] and loss.needs and loss.needs not in ROUTERS[moe.router].sums:
            giving = [router for router, one in ROUTERS.items() if loss.needs in one.sums]
            yield (
                f"model.moe.losses.{name} = {moe.losses[name]} needs a sum that model.moe.router = "
                f'"{moe.router}" does not give: set it to 0, or choose {" or ".join(giving)}'
            )
    if not moe.adaptive.rate:
        return
    # Without a coefficient there is nothing whose weight could grow.
    if not any(moe.losses[name] for name in BALANCE):
        yield (
            f"model.moe.adaptive.rate = {moe.adaptive.rate} drives the weight of the balance "
            "losses, but all their coefficients are 0: give one (of model.moe.losses: "
            f"{', '.join(BALANCE)}), or set the rate to 0"
        )
    if not DISPATCHERS[moe.dispatcher].drops:
        dropping = " or ".join(name for name, one in DISPATCHERS.items() if one.drops)
        yield (
            f"model.moe.adaptive.rate = {moe.adaptive.rate} follows what is dropped for want of "
            f'room, and model.moe.dispatcher = "{moe.dispatcher}" has room for all. Set '
            f"model.moe.dispatcher={dropping}, or the rate to 0"
        )


def _leak(cfg: Config) -> Iterator[str]:
    seen = causality.leaks(cfg.model)
    if cfg.model.allow_leak or not (seen.future or seen.batch):
        return
    what = "a later token" if seen.future else "another sequence"
    yield (
        f"{'; '.join(causality.reasons(cfg.model))}: in training {what} would change an earlier "
        "token's output, so the training loss of this causal model would be that of one that "
        "cannot be decoded (docs/routers.md has the measured leaks). Choose another, or set "
        "model.allow_leak=True"
    )


def _batch(cfg: Config) -> Iterator[str]:
    train, mesh = cfg.train, cfg.mesh
    devices = mesh.batch_devices
    if train.batch_size % train.micro_batch_size:
        yield (
            f"train.batch_size ({train.batch_size}) must be divisible by "
            f"train.micro_batch_size ({train.micro_batch_size})"
        )
    sizes = {
        "train.micro_batch_size": train.micro_batch_size,
        "eval.batch_size": cfg.eval.batch_size,
    }
    # Both are batches of the same model, split in the same way.
    for path, rows in sizes.items():
        if rows % devices:
            yield (
                f"{path} ({rows} rows) must be divisible by "
                f"mesh.data x mesh.expert ({mesh.data} x {mesh.expert})"
            )
        # A group never spans a device.
        group_rows, of_device = cfg.model.moe.group_rows, rows // devices
        if cfg.model.num_moe_layers and of_device % group_rows:
            yield (
                f"model.moe.group_rows ({group_rows}) must divide the rows of one device "
                f"({of_device} = {path} {rows} / (mesh.data {mesh.data} x mesh.expert "
                f"{mesh.expert}))"
            )


def _train(cfg: Config) -> Iterator[str]:
    if cfg.profile and cfg.profile[0] >= cfg.train.steps:
        yield (
            f"profile = {cfg.profile[0]}:{cfg.profile[1]} begins after the last step "
            f"(train.steps = {cfg.train.steps}): nothing would be traced"
        )
    first = cfg.record.steps.first
    if first and first > cfg.train.steps:
        yield (
            f'record.steps = "{cfg.record.steps.text}" begins after the last step '
            f"(train.steps = {cfg.train.steps}): nothing would be recorded"
        )
    for pair in cfg.train.init_rename:
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not (is_pair and all(isinstance(name, str) for name in pair)):
            yield (
                f"train.init_rename: {pair!r} is no pair of names, "
                'as in (("repeats/0", "prefix/0"),)'
            )
    if cfg.train.init_rename and not cfg.train.init_from:
        yield (
            "train.init_rename renames what train.init_from loads, and that is empty: "
            "name a run, or leave it alone"
        )
    # A rule moves zeros by itself, without an update that could be left out.
    zeros = cfg.model.moe.sparse
    rule = zeros.rule
    if cfg.optim.train_only and not zeros.dense and RULES[rule].moves:
        yield (
            f'model.moe.sparse.rule = "{rule}" changes experts after an update, and '
            f'optim.train_only = "{cfg.optim.train_only}" would not keep it from those that are '
            'frozen: set the rule to "static" or "none", or leave train_only empty'
        )
    if cfg.optim.master_copy and cfg.model.param_dtype != "bfloat16":
        yield (
            f"optim.master_copy = True does nothing: model.param_dtype = {cfg.model.param_dtype} "
            "needs no copy in float32. Set optim.master_copy=False, or model.param_dtype=bfloat16"
        )
