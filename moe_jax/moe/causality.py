"""What may change a token's output: a property of router x ordering x dispatcher x group together."""

from typing import Any

from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sees


def sees(moe: Any) -> Sees:
    """`moe`: the frozen `model.moe` block of a config (config.MoEConfig)."""
    router, drops = ROUTERS[moe.router].sees(moe.router_options), moe.dispatcher == "capacity"
    future = router.future or _ordering_sees_future(moe)
    # Rows of one group share capacity, and whatever is chosen over tokens is chosen over a group.
    shared = moe.group_rows > 1 and (drops or future)
    return Sees(future, router.batch or shared)


def _ordering_sees_future(moe: Any) -> bool:
    ordering, drops = ORDERINGS[moe.ordering], moe.dispatcher == "capacity"
    # All first choices before all second ones is the order of the tokens where there is only one choice.
    single = ROUTERS[moe.router].declared(moe.num_experts, moe.router_options).most == 1
    return ordering.always or (drops and ordering.sees_future and not (single and moe.ordering == "k_major"))


def reasons(moe: Any) -> list[str]:
    """The keys that make it leak, in plain words."""
    router, drops, found = ROUTERS[moe.router].sees(moe.router_options), moe.dispatcher == "capacity", []
    if router.future:
        found.append(f'model.moe.router = "{moe.router}" chooses over all tokens of a sequence')
    if router.batch:
        found.append(f'model.moe.router = "{moe.router}" chooses over all sequences of the batch')
    if _ordering_sees_future(moe):
        found.append(f'model.moe.ordering = "{moe.ordering}" lets later tokens take the places of earlier ones')
    if moe.group_rows > 1 and drops:
        found.append(f"model.moe.group_rows = {moe.group_rows} sequences share the capacity of an expert")
    return found
