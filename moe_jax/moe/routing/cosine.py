"""The cosine router of X-MoE (Chi et al. 2022, arXiv:2204.09179, section 3, eq. 6-7): scores on a
low-dimensional hypersphere.

    s_e = (P x) . e_e / (|P x| |e_e|);   logits = s / temperature;
    then top-k as in top_k.py, softmax before the selection

`dim` is the width of the hypersphere; 0 = E / 2 as in the paper, at least 2. The temperature is
learned, one number per layer that starts at `temperature` (0.3 in the paper) and is clamped from
below at `min_temperature` in use. The probabilities of the balance loss are those of the learned
temperature too, where the paper keeps the first one (eq. 8). Ties go to the lower index.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Setting,
    Sizes,
    Tokens,
    router_logits,
    sees_nothing,
    times_k,
    token_choice,
)
from moe_jax.moe.routing.statistics import statistics
from moe_jax.moe.routing.top_k import renormalized
from moe_jax.schema.options import COUNT, NOT_TINY, NUMBER, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)
    renormalize: bool = option(True, "gates of a token sum to 1")
    dim: int = option(0, "of the hypersphere; 0 = num_experts / 2, at least 2", COUNT)
    temperature: float = option(0.3, "first value; learned", NOT_TINY)
    min_temperature: float = option(0.01, "it acts at least as high", NOT_TINY)


def params(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares the projection [D, dim], an embedding per expert [dim, E] and the temperature."""
    dim = fixed(sizes.num_experts, options).dim
    return {
        "project": Weight((sizes.d_model, dim), ("embed", None), sizes.d_model**-0.5),
        "experts": Weight((dim, sizes.num_experts), (None, None), dim**-0.5),
        "temperature": Weight((), (), 0.0, options.temperature),
    }


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns assignments token by token, a token's choices in order of falling gate."""
    del state, rng, train
    # M is `dim`, the width of the hypersphere.
    projected_TM = router_logits(tokens.x_TD, params["project"])
    # [T, M] and [M, E] of length 1: their product is the cosine of token and expert.
    token_TM = _unit_length(projected_TM, axis=1)
    expert_ME = _unit_length(params["experts"].astype(token_TM.dtype), axis=0)
    learned_temperature = params["temperature"].astype(token_TM.dtype)
    # The bound keeps the logits finite, however small the temperature becomes.
    temperature = jnp.maximum(learned_temperature, cfg.options.min_temperature)
    cosine_TE = router_logits(token_TM, expert_ME)
    router_logits_TE = cosine_TE / temperature
    # Cosines lie in [-1, 1]: without a temperature the softmax would be nearly even.
    router_probs_TE = jax.nn.softmax(router_logits_TE)
    gate_TK, expert_index_TK = jax.lax.top_k(router_probs_TE, cfg.options.k)
    if cfg.options.renormalize:
        gate_TK = renormalized(gate_TK)
    # z is of the logits over the temperature, as the softmax takes them.
    sums = statistics(router_logits_TE, expert_index_TK, gate_TK, tokens)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)


def _unit_length(x: jax.Array, axis: int) -> jax.Array:
    """Returns x / |x| along an axis; zero, as padding may be, stays zero."""
    # The bound stands inside the root, so that the gradient at zero is finite.
    square_length = jnp.square(x).sum(axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square_length, 1e-24))


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=1.0 if options.renormalize else None)


def fixed(num_experts: int, options: Options) -> Options:
    """Returns the options with the width that follows from the number of experts."""
    return dataclasses.replace(options, dim=options.dim or max(2, num_experts // 2))


def refusals(options: Options, setting: Setting) -> Iterator[str]:
    """Refuses a first temperature that may not act."""
    at = setting.at
    if options.temperature < options.min_temperature:
        yield (
            f"{at}.temperature ({options.temperature}) must be at least {at}.min_temperature "
            f"({options.min_temperature})"
        )


ROUTER = Router(
    Options,
    route,
    sees_nothing,
    declared,
    params=params,
    refusals=refusals,
    multiplied=times_k,
    fixed=fixed,
)
