"""Whether a model can be decoded token by token, and the model that is decoded."""

import dataclasses

from moe_jax.errors import UserError
from moe_jax.models import MODELS
from moe_jax.moe.dispatch import DISPATCHERS, LOSSLESS
from moe_jax.moe.routing import ROUTERS
from moe_jax.schema.config import ModelConfig


def why_not_decoded(cfg: ModelConfig) -> str:
    """Returns why a model cannot be decoded token by token; "" where it can.

    A router that balances in training alone can.
    """
    kind = MODELS[cfg.kind]
    if not kind.writes_text:
        return f'model.kind = "{cfg.kind}" continues no text'
    return kind.why_silent(cfg.kind_options) or why_not_cached(cfg)


def why_not_cached(cfg: ModelConfig) -> str:
    """Returns why the experts cannot work token by token; "" where they can."""
    moe = cfg.moe
    # Without experts every token goes its own way but for attention, which has a cache.
    if not cfg.num_moe_layers:
        return ""
    router = ROUTERS[moe.router]
    if router.replays:
        return (
            f'model.moe.router = "{moe.router}" replays a recording, and there is none of text '
            "that is yet to be written"
        )
    if router.own_capacity or DISPATCHERS[moe.dispatcher].mixes:
        return (
            f'model.moe.router = "{moe.router}" chooses over all tokens of a sequence, at '
            "evaluation too: token by token it would be "
            "another model than the one that was trained"
        )
    return ""


def for_decoding(cfg: ModelConfig) -> ModelConfig:
    """Returns the same model as `Decoder.cached` runs it: nothing drops, layers unstacked.

    UserError where `why_not_decoded`.
    """
    if reason := why_not_decoded(cfg):
        raise UserError(f"this model cannot be decoded: {reason}")
    # Who shares capacity in training must not matter to a text that is written alone.
    return token_by_token(cfg)


def token_by_token(cfg: ModelConfig) -> ModelConfig:
    """Returns the same model as it is run on a token a row: lossless, layers unstacked."""
    lossless = with_dispatcher(cfg, LOSSLESS)
    options = dataclasses.replace(lossless.moe.dispatcher_options, direct=True)
    moe = dataclasses.replace(lossless.moe, dispatcher_options=options)
    return dataclasses.replace(lossless, moe=moe, scan=False)


def reading_sources(cfg: ModelConfig) -> ModelConfig:
    """Returns the same model as an encoder runs it on whole source rows, layers unstacked: it drops
    what is a property of the model, and nothing else.
    """
    lossless = token_by_token(cfg)
    if not DISPATCHERS[cfg.moe.dispatcher].of_the_model(cfg.moe.dispatcher_options):
        return lossless
    return dataclasses.replace(lossless, moe=cfg.moe)


def with_dispatcher(cfg: ModelConfig, name: str) -> ModelConfig:
    """Returns the same model with another dispatcher, for decoding or for evaluation.

    UserError for soft MoE, which has but one.
    """
    moe = cfg.moe
    if moe.dispatcher == name:
        return cfg
    if DISPATCHERS[moe.dispatcher].mixes:
        raise UserError(
            f'model.moe.router = "{moe.router}" fills slots, which the dispatcher "{name}" '
            "knows nothing of"
        )
    options = DISPATCHERS[name].options()
    changed = dataclasses.replace(moe, dispatcher=name, dispatcher_options=options)
    return dataclasses.replace(cfg, moe=changed)
