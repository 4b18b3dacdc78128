"""A card as JSON values."""

from collections.abc import Mapping
from typing import Any

from moe_jax.plan.card import Card


def of_card(card: Card) -> dict[str, Any]:
    """Returns all that a card has, and what follows from it."""
    values = {name: _plain(value) for name, value in card._asdict().items()}
    values["mesh"] = str(card.mesh)
    values["tokens_per_step"] = card.tokens_per_step
    values["parameters"] |= {
        "total": card.parameters.total,
        "active": card.parameters.active,
    }
    values["compiled"] |= {"peak": card.compiled.peak}
    values["peak_logged"], values["fits"] = card.peak_logged, card.fits
    if card.estimate:
        estimate = card.estimate
        values["estimate"] |= {
            "step": estimate.step,
            "bound": estimate.bound,
            "tokens_per_second": estimate.tokens_per_second,
            "mfu": estimate.mfu,
        }
    return values


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(one) for name, one in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value
