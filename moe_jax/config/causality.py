"""What may change a token's output: a property of router x ordering x dispatcher x group together,
and of depth blocks.

In a causal model nothing but the token itself and earlier ones may. An encoder reads its whole row,
and the tasks of MMoE's rows know of each other, so there later tokens may; another sequence may not
in any model.

A sequence is a row here, not a document. Documents that are packed into one row never attend to
each other, but with the dispatcher "capacity" they share its places: an earlier one takes them
first, so what it routes may drop an assignment of a later one. That is causal, and allowed; what
must not be needs documents in rows of their own, or the dispatcher "dropless".
"""

from moe_jax.models import MODELS
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sees
from moe_jax.schema.config import ModelConfig, MoEConfig


def leaks(model: ModelConfig) -> Sees:
    """Returns what a model sees in training and must not."""
    seen = sees(model)
    # Another sequence may not matter in any model, later tokens may in some.
    return seen._replace(future=seen.future and MODELS[model.kind].causal)


def sees(model: ModelConfig) -> Sees:
    """Returns what a whole model sees in training."""
    seen = _experts(model.moe) if model.num_moe_layers else Sees(False, False)
    return seen._replace(future=seen.future or _depth(model) or _attention(model))


def _experts(moe: MoEConfig) -> Sees:
    """Returns what the output of the MoE layers depends on beside the token and earlier ones."""
    router = ROUTERS[moe.router].sees(moe.router_options)
    drops = DISPATCHERS[moe.dispatcher].drops
    future = router.future or _ordering(moe)
    # Rows of one group share capacity, and whatever is chosen over tokens is chosen over a group.
    shared = moe.group_rows > 1 and (drops or future)
    return Sees(future, router.batch or shared)


def _ordering(moe: MoEConfig) -> bool:
    """Returns whether the order of the assignments sees the future."""
    ordering = ORDERINGS[moe.ordering]
    if ordering.always:
        return True
    # Without drops every assignment gets its place, whatever comes first.
    if not (DISPATCHERS[moe.dispatcher].drops and ordering.sees_future):
        return False
    # All first choices before all second ones is the order of the tokens where there is only one
    # choice.
    single = ROUTERS[moe.router].declared(moe.num_experts, moe.router_options).most == 1
    return not (single and ordering.by_choice)


def _depth(model: ModelConfig) -> bool:
    """Returns whether depth blocks see the future: they train on the tokens that their router
    scores highest in the whole row. With all of them there is no choice.
    """
    return model.num_depth_blocks > 0 and model.depth.capacity < 1


def _attention(model: ModelConfig) -> bool:
    """Returns whether attention itself sees the future, where the mask is causal."""
    return bool(_ahead(model))


def _ahead(model: ModelConfig) -> list[str]:
    """Returns the attentions of a model that see the future."""
    used = model.attentions if model.kind_options.masks else ()
    return [name for name in dict.fromkeys(used) if ATTENTIONS[name].sees_future]


def reasons(model: ModelConfig) -> list[str]:
    """Returns the keys that make a model leak, in plain words."""
    sentences, moe = [], model.moe
    if _depth(model) and MODELS[model.kind].causal:
        sentences.append(
            f"depth blocks (model.depth.capacity = {model.depth.capacity}) train on the tokens "
            "that score highest in the whole sequence"
        )
    if MODELS[model.kind].causal:
        sentences += [f'model.attention = "{name}" sees later tokens' for name in _ahead(model)]
    if not model.num_moe_layers:
        return sentences
    router = ROUTERS[moe.router].sees(moe.router_options)
    drops = DISPATCHERS[moe.dispatcher].drops
    causal = MODELS[model.kind].causal
    if router.future and (causal or moe.group_rows > 1):
        sentences.append(f'model.moe.router = "{moe.router}" chooses over all tokens of a sequence')
    if router.batch:
        sentences.append(
            f'model.moe.router = "{moe.router}" chooses over all sequences of the batch'
        )
    if _ordering(moe) and (causal or moe.group_rows > 1):
        sentences.append(
            f'model.moe.ordering = "{moe.ordering}" lets later tokens take the places of earlier '
            "ones"
        )
    if moe.group_rows > 1 and drops:
        sentences.append(
            f"model.moe.group_rows = {moe.group_rows} sequences share the capacity of an expert"
        )
    return sentences
