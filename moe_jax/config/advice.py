"""What a run is told at its start: what is allowed, and hardly ever meant.

What a component alone knows is in its own file; here is what ties it to others. Options that do
nothing because another key switches them off are in idle.py.
"""

import dataclasses
from collections.abc import Iterator

from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe.dispatch import DISPATCHERS, chunks
from moe_jax.moe.losses import BALANCE, LOSSES
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sizes
from moe_jax.optim import schedules
from moe_jax.schema.config import Config, MoEConfig


def notes(cfg: Config) -> Iterator[str]:
    """Yields a sentence for each thing that the config allows and that is hardly ever meant."""
    if cut := schedules.warmup_note(cfg.optim):
        yield cut
    if cfg.model.param_dtype == "bfloat16" and not cfg.optim.master_copy:
        yield (
            "model.param_dtype = bfloat16 rounds away every update below 1/512 of a weight, so "
            "that at a small learning rate nothing is learned (docs/precision.md). Set "
            "optim.master_copy=True, or model.param_dtype=float32 and model.dtype=bfloat16"
        )
    if cfg.model.kind_options.masks:
        for name in dict.fromkeys(cfg.model.attentions):
            one = dataclasses.replace(cfg, model=cfg.model.with_attention(name))
            yield from ATTENTIONS[name].advice(one)
    if cfg.model.num_moe_layers:
        moe = cfg.model.moe
        at = f"model.moe.dispatchers.{moe.dispatcher}"
        yield from _of_router(cfg)
        yield from DISPATCHERS[moe.dispatcher].advice(moe.dispatcher_options, at, cfg.mesh.expert)
        yield from _of_chunks(cfg)
        if not DISPATCHERS[moe.dispatcher].drops:
            yield from _of_lossless(moe)


def _of_chunks(cfg: Config) -> Iterator[str]:
    """Yields that a layer has fewer chunks than were asked for."""
    moe, mesh = cfg.model.moe, cfg.mesh
    rows = cfg.train.micro_batch_size // mesh.batch_devices
    sizes = (rows * cfg.data.seq_len, min(moe.group_rows, rows) * cfg.data.seq_len)
    dispatcher = DISPATCHERS[moe.dispatcher]
    made = chunks.number_of(dispatcher, *sizes, mesh.expert, moe.overlap_chunks)
    if made < moe.overlap_chunks:
        yield (
            f"model.moe.overlap_chunks = {moe.overlap_chunks} makes {made} of the {rows} rows of a "
            f"device: chunks are whole groups where something drops, and mesh.expert "
            f"({mesh.expert}) must be more than 1"
        )


def _of_router(cfg: Config) -> Iterator[str]:
    """Yields losses that pull at a router in vain, or against its own balance; a gate without
    gradient.
    """
    moe = cfg.model.moe
    router = ROUTERS[moe.router]
    sizes = Sizes(cfg.model.d_model, moe.num_experts, cfg.model.vocab_size)
    # Some routers have no weights: hash, random, uniform.
    learns = bool(router.params(sizes, moe.router_options))
    pulling = [name for name in _unwanted_losses(moe, learns) if moe.losses[name]]
    pulls = " and ".join(f"model.moe.losses.{name} = {moe.losses[name]}" for name in pulling)
    balanced_by = router.balanced_by(moe.router_options)
    # A router without weights gets no gradient, whatever the loss.
    if pulls and not learns:
        yield f"the router {moe.router} has no weights: {pulls} cannot change anything"
    elif pulls and balanced_by:
        yield (
            f"the router {moe.router} is balanced by {balanced_by}, and {pulls} on top of it pulls "
            "as well: 0 is its paper's"
        )
    # The gates of a token have a fixed sum: a single one is a constant, without gradient.
    declared = router.declared(moe.num_experts, moe.router_options)
    if learns and declared.most == 1 and declared.gate_sum is not None:
        yield (
            f"the router {moe.router} has one choice per token, and its gate is always "
            f"{declared.gate_sum:g}: the loss of the task cannot teach it. Set "
            f"model.moe.routers.{moe.router}.renormalize=False where it has that, or "
            "model.moe.router=switch"
        )


def _unwanted_losses(moe: MoEConfig, learns: bool) -> tuple[str, ...]:
    """Returns the losses that a router which balances itself, or cannot learn, has not in its
    paper.
    """
    if not learns:
        return tuple(LOSSES)
    router = ROUTERS[moe.router]
    # A balance loss of its paper is wanted; any other pulls against its own balance.
    return (*(name for name in BALANCE if name not in router.losses), *router.no_losses)


def _of_lossless(moe: MoEConfig) -> Iterator[str]:
    """Yields what says who is dropped, or who shares room: it does nothing where there is room for
    all.
    """
    ordering, dispatcher = ORDERINGS[moe.ordering], moe.dispatcher
    if ordering.sees_future and not ordering.always:
        yield (
            f'model.moe.ordering = "{moe.ordering}" says what is dropped first, and '
            f'model.moe.dispatcher = "{dispatcher}" drops nothing'
        )
    # A router that chooses over tokens, or an ordering that always acts, uses groups all the same.
    alone = not ROUTERS[moe.router].sees(moe.router_options).future and not ordering.always
    if moe.group_rows > 1 and alone:
        yield (
            f"model.moe.group_rows = {moe.group_rows} rows share capacity, and "
            f'model.moe.dispatcher = "{dispatcher}" has none to share'
        )
