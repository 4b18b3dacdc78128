"""A mixture of experts as NumPy loops, forward and backward by hand, in float64.

Slow, obvious, and sharing no code with the product.

Shapes: T tokens, K choices, E experts, D model, F hidden, P = 2 (gate, up) for SwiGLU or 1 for
GELU.
"""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def activate(h_PF):
    """(value [F], derivative with respect to h [P, F] per unit of the output [F])."""
    if len(h_PF) == 2:
        gate, up = h_PF
        s = sigmoid(gate)
        return gate * s * up, np.stack([(s + gate * s * (1 - s)) * up, gate * s])
    (x,) = h_PF
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    t = np.tanh(inner)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + t), np.stack([0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope])


def experts(x_TD, assignments, w_in_EDPF, w_out_EFD, dy_TD):
    """y_t = sum over kept (t, e, gate) of gate * expert_e(x_t), and the gradients of sum(y * dy).

    `assignments`: (token, expert, gate) of those that are served. Returns (y, dx, dgate per
    assignment, dw_in, dw_out).
    """
    y, dx = np.zeros_like(x_TD), np.zeros_like(x_TD)
    dw_in, dw_out, dgates = np.zeros_like(w_in_EDPF), np.zeros_like(w_out_EFD), []
    for t, e, gate in assignments:
        h_PF = np.einsum("d,dpf->pf", x_TD[t], w_in_EDPF[e])
        a_F, slope_PF = activate(h_PF)
        out_D = a_F @ w_out_EFD[e]
        y[t] += gate * out_D
        dgates.append(out_D @ dy_TD[t])
        da_F = gate * (w_out_EFD[e] @ dy_TD[t])
        dw_out[e] += gate * np.outer(a_F, dy_TD[t])
        dh_PF = slope_PF * da_F[None]
        dw_in[e] += np.einsum("d,pf->dpf", x_TD[t], dh_PF)
        dx[t] += np.einsum("dpf,pf->d", w_in_EDPF[e], dh_PF)
    return y, dx, np.array(dgates), dw_in, dw_out


def served(expert_TK, valid_T, num_experts, group_tokens=None, factor=None, order=None):
    """The (t, k) pairs that are served.

    With a capacity factor: at most C per expert and group, in order.

    `order`: all pairs by falling priority; token by token, a token's choices in turn, unless given.
    """
    num_tokens, k = expert_TK.shape
    places = num_tokens * k
    if factor is not None:
        places = max(
            1, min(math.ceil(factor * k * group_tokens / num_experts - 1e-9), group_tokens)
        )
    taken, kept = {}, []
    for t, j in order or [(t, j) for t in range(num_tokens) for j in range(k)]:
        if not valid_T[t]:
            continue
        slot = (t // group_tokens if group_tokens else 0, int(expert_TK[t, j]))
        if taken.get(slot, 0) < places:
            taken[slot] = taken.get(slot, 0) + 1
            kept.append((t, j))
    return kept


def top_k(x_TD, gate_DE, k, softmax="before", renormalize=True, scale=1.0):
    """(experts [T, K], gates [T, K], probabilities [T, E]); ties to the lower index."""
    logits = x_TD @ gate_DE
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    chosen = np.stack(
        [sorted(range(probs.shape[1]), key=lambda e: (-row[e], e))[:k] for row in logits]
    )
    picked = np.take_along_axis(probs, chosen, -1)
    if softmax == "after" or renormalize:
        picked = picked / picked.sum(-1, keepdims=True)
    return chosen, picked * scale, probs


def top_k_backward(x_TD, gate_DE, k, dgates_TK, renormalize=True, scale=1.0):
    """(dx, dW) of the gates of `top_k` (softmax before), by the chain rule through renormalisation
    and softmax.
    """
    chosen, _, probs = top_k(x_TD, gate_DE, k, renormalize=False)
    dlogits = np.zeros_like(probs)
    for t in range(len(x_TD)):
        p = probs[t, chosen[t]]
        dg = dgates_TK[t] * scale
        dp = (dg - (dg @ p) / p.sum()) / p.sum() if renormalize else dg
        full = np.zeros(probs.shape[1])
        full[chosen[t]] = dp
        dlogits[t] = probs[t] * (full - full @ probs[t])
    return dlogits @ gate_DE.T, x_TD.T @ dlogits


def latent_experts(x_TD, assignments, down_DL, up_LD, w_in_ELPF, w_out_EFL, dy_TD):
    """Experts that work in a narrower width: y = experts(x down) up, and the gradients of
    sum(y * dy).

    Returns (y, dx, dgate per assignment, ddown, dup, dw_in, dw_out).
    """
    z_TL = x_TD @ down_DL
    inner_TL, dz_TL, dgates, dw_in, dw_out = experts(
        z_TL, assignments, w_in_ELPF, w_out_EFL, dy_TD @ up_LD.T
    )
    dx_TD = dz_TL @ down_DL.T
    return inner_TL @ up_LD, dx_TD, dgates, x_TD.T @ dz_TL, inner_TL.T @ dy_TD, dw_in, dw_out
