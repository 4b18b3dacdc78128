"""Noisy top-k (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5) with its smooth estimate of the load
(appendix A, eq. 8-10).

    h = x W + noise * sigma,  sigma = softplus(x W_noise) + min_noise
        noise is standard normal; none outside of training
    the k largest h;  gates = softmax over those k
    load_e = sum over tokens of P_e;  P_e = Phi((x W - threshold_e) / sigma)

P_e is the probability that expert e stays chosen when its own noise is drawn again: threshold_e is
the k-th largest h of the other experts. Its sum per row is sums["load"] [b, E], with a gradient,
which counts have not; the loss "load" is its squared coefficient of variation (eq. 10-11). W_noise
starts at zero as in the paper; W does not, so that this router starts where the others do.
`min_noise` is not in the paper but in the authors' code (tensor2tensor, noise_epsilon = 0.01): it
bounds the division. Ties go to the lower index.

Shapes: see contract.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Sizes,
    Tokens,
    linear_gate,
    normal,
    router_logits,
    sees_nothing,
    times_k,
    token_choice,
)
from moe_jax.moe.routing.statistics import per_row, statistics
from moe_jax.schema.options import NOT_TINY, NUMBER, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)
    min_noise: float = option(0.01, "least standard deviation of the noise", NOT_TINY)


def params(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares the gate and the matrix of the noise, both [D, E]."""
    noise = Weight((sizes.d_model, sizes.num_experts), ("embed", None), 0.0)
    return {**linear_gate(sizes, options), "noise": noise}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns assignments token by token.

    Balance loss, z and entropy are of the logits without noise.
    """
    del state
    k = cfg.options.k
    clean_logits_TE = router_logits(tokens.x_TD, params["gate"])
    noise_logits_TE = router_logits(tokens.x_TD, params["noise"])
    sigma_TE = jax.nn.softplus(noise_logits_TE) + cfg.options.min_noise
    noisy_logits_TE = clean_logits_TE
    if train:
        noise_TE = normal(rng, tokens, cfg.num_experts, clean_logits_TE.dtype)
        noisy_logits_TE = clean_logits_TE + sigma_TE * noise_TE
    top_logits_TK, expert_index_TK = jax.lax.top_k(noisy_logits_TE, k)
    # Equation 3: all logits but the k largest are -inf, so their gates are 0.
    gate_TK = jax.nn.softmax(top_logits_TK)
    probability_TE = stays_chosen(clean_logits_TE, noisy_logits_TE, sigma_TE, k)
    load_TE = jnp.where(tokens.valid_T[:, None], probability_TE, 0)
    sums = statistics(clean_logits_TE, expert_index_TK, gate_TK, tokens)
    sums["load"] = per_row(load_TE, tokens)
    return token_choice(expert_index_TK, gate_TK, sums, tokens, cfg.num_experts)


def stays_chosen(
    clean_logits_TE: jax.Array, noisy_logits_TE: jax.Array, sigma_TE: jax.Array, k: int
) -> jax.Array:
    """Returns P [T, E] of eq. 8-9: Phi((x W - threshold) / sigma).

    The threshold of an expert is the k-th largest noisy logit of the others.
    """
    if k == clean_logits_TE.shape[1]:
        # With k = E every expert is chosen, whatever the noise.
        return jnp.ones_like(clean_logits_TE)
    top_TK, _ = jax.lax.top_k(noisy_logits_TE, k + 1)
    last_chosen_T1 = top_TK[:, k - 1 : k]
    first_left_T1 = top_TK[:, k:]
    # Without itself, a chosen expert competes with the first that was left out, and one that was
    # left out with the last that was chosen.
    is_chosen_TE = noisy_logits_TE > first_left_T1
    threshold_TE = jnp.where(is_chosen_TE, first_left_T1, last_chosen_T1)
    return _normal_cdf((clean_logits_TE - threshold_TE) / sigma_TE)


@jax.custom_jvp
def _normal_cdf(z: jax.Array) -> jax.Array:
    """Returns Phi(z) by the incomplete gamma function: erf(x) = sign(x) P(1/2, x^2)."""
    # jax 0.12's own norm.cdf, erf and erfc are polynomials whose constant coefficients a shard_map
    # refuses to meet with what varies over devices.
    erf = jnp.sign(z) * jax.lax.igamma(jnp.full_like(z, 0.5), 0.5 * z * z)
    return 0.5 * (1 + erf)


# The derivative of Phi is the normal density. That of `igamma` is a series, and infinite at 0.
_normal_cdf.defjvps(lambda tangent, _, z: tangent * jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=1.0)


ROUTER = Router(
    Options, route, sees_nothing, declared, params=params, sums=("load",), multiplied=times_k
)
