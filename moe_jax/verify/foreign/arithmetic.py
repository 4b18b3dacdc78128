"""A mixture of experts as plain arithmetic in NumPy, float64, with gradients by hand: every expert
works on every token, and the gates pick.

It shares no code with the layers, and no automatic differentiation.

Shapes as in contract.py.
"""

import math
from typing import NamedTuple

import numpy as np

from moe_jax.verify.foreign.contract import Inputs, Layer


class Expected(NamedTuple):
    """Holds what a layer should return."""

    y_TD: np.ndarray
    dropped_TK: np.ndarray
    # By name in `Inputs`, of the sum of y * dy.
    gradients: dict[str, np.ndarray]


def expected(inputs: Inputs, layer: Layer, dy_TD: np.ndarray) -> Expected:
    """Returns output and gradients of the equation in `Layer`."""
    x_TD = inputs.x_TD
    logits_TE = x_TD @ inputs.router_DE if layer.given == "router" else inputs.logits_TE
    if layer.given == "choices":
        expert_TK, gate_TK = inputs.expert_TK, inputs.gate_TK
    else:
        expert_TK, gate_TK = choose(logits_TE, layer)
    served_TK = places(expert_TK, inputs.valid_T, inputs.w_down_EFD.shape[0], layer)

    # 1. Every expert works on every token.
    up_TEF = np.einsum("TD,EDF->TEF", x_TD, inputs.w_up_EDF)
    gated = layer.activation == "swiglu"
    # The gate columns, or the only ones.
    preactivation_TEF = np.einsum("TD,EDF->TEF", x_TD, inputs.w_gate_EDF) if gated else up_TEF
    value_TEF, slope_TEF = silu(preactivation_TEF) if gated else gelu(preactivation_TEF)
    hidden_TEF = value_TEF * up_TEF if gated else value_TEF
    out_TED = np.einsum("TEF,EFD->TED", hidden_TEF, inputs.w_down_EFD)

    # 2. The gates pick.
    token_T1 = np.arange(len(x_TD))[:, None]
    gate_TE = np.zeros(out_TED.shape[:2])
    # Added, not set: the gates of an expert that is chosen twice add up.
    np.add.at(gate_TE, (token_T1, expert_TK), gate_TK * served_TK)
    y_TD = np.einsum("TE,TED->TD", gate_TE, out_TED)

    # 3. Backwards through both.
    dgate_TE = np.einsum("TED,TD->TE", out_TED, dy_TD)
    dgate_TK = dgate_TE[token_T1, expert_TK] * served_TK
    # A token reads an expert as far as its gate says, and so does the gradient.
    dhidden_TEF = gate_TE[:, :, None] * np.einsum("EFD,TD->TEF", inputs.w_down_EFD, dy_TD)
    gradients = {
        "w_down_EFD": np.einsum("TE,TEF,TD->EFD", gate_TE, hidden_TEF, dy_TD),
    }
    dup_TEF = dhidden_TEF * (value_TEF if gated else slope_TEF)
    gradients["w_up_EDF"] = np.einsum("TD,TEF->EDF", x_TD, dup_TEF)
    dx_TD = np.einsum("EDF,TEF->TD", inputs.w_up_EDF, dup_TEF)
    if gated:
        dgate_TEF = dhidden_TEF * up_TEF * slope_TEF
        gradients["w_gate_EDF"] = np.einsum("TD,TEF->EDF", x_TD, dgate_TEF)
        dx_TD += np.einsum("EDF,TEF->TD", inputs.w_gate_EDF, dgate_TEF)

    # 4. And through the choice, as far as it has a gradient.
    if layer.given == "choices":
        gradients["gate_TK"] = dgate_TK
    else:
        dlogits_TE = choose_backward(logits_TE, expert_TK, dgate_TK, layer)
        if layer.given == "logits":
            gradients["logits_TE"] = dlogits_TE
        else:
            gradients["router_DE"] = x_TD.T @ dlogits_TE
            dx_TD += dlogits_TE @ inputs.router_DE.T
    gradients["x_TD"] = dx_TD
    dropped_TK = ~served_TK & inputs.valid_T[:, None]
    return Expected(y_TD, dropped_TK, gradients)


def scores(logits_TE: np.ndarray, layer: Layer) -> np.ndarray:
    """Returns the scores of all experts."""
    if layer.score == "sigmoid":
        return 1 / (1 + np.exp(-logits_TE))
    # Relative to the largest, so that no exponential overflows.
    powers_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
    return powers_TE / powers_TE.sum(1, keepdims=True)


def choose(logits_TE: np.ndarray, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the experts with the largest logits, falling, and their gates, [T, K] each."""
    # A stable sort: of equal logits the lower expert comes first.
    expert_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, : layer.k]
    picked_TK = np.take_along_axis(scores(logits_TE, layer), expert_TK, 1)
    if layer.renormalize:
        picked_TK = picked_TK / picked_TK.sum(1, keepdims=True)
    return expert_TK.astype(np.int32), layer.scale * picked_TK


def choose_backward(
    logits_TE: np.ndarray, expert_TK: np.ndarray, dgate_TK: np.ndarray, layer: Layer
) -> np.ndarray:
    """Returns the gradient of the logits from that of the gates."""
    score_TE = scores(logits_TE, layer)
    picked_TK = np.take_along_axis(score_TE, expert_TK, 1)
    dpicked_TK = layer.scale * dgate_TK
    if layer.renormalize:
        # Of p / sum(p).
        total_T1 = picked_TK.sum(1, keepdims=True)
        mean_T1 = (dpicked_TK * picked_TK).sum(1, keepdims=True) / total_T1
        dpicked_TK = (dpicked_TK - mean_T1) / total_T1
    dscore_TE = np.zeros_like(score_TE)
    np.put_along_axis(dscore_TE, expert_TK, dpicked_TK, 1)
    if layer.score == "sigmoid":
        return dscore_TE * score_TE * (1 - score_TE)
    # Of the softmax: p_i (ds_i - sum_j p_j ds_j).
    return score_TE * (dscore_TE - (dscore_TE * score_TE).sum(1, keepdims=True))


def places(
    expert_TK: np.ndarray, valid_T: np.ndarray, num_experts: int, layer: Layer
) -> np.ndarray:
    """Returns whether each choice has a place [T, K]: token by token, its choices in turn."""
    num_tokens = len(expert_TK)
    served_TK = np.repeat(valid_T[:, None], expert_TK.shape[1], axis=1)
    if layer.capacity is None:
        return served_TK
    group_tokens = layer.group_tokens or num_tokens
    # By group of tokens and expert; the last group may be shorter.
    taken = np.zeros((-(-num_tokens // group_tokens), num_experts), int)
    for token, choice in np.argwhere(served_TK):
        place = token // group_tokens, expert_TK[token, choice]
        served_TK[token, choice] = taken[place] < layer.capacity
        # It counts on beyond the capacity, which changes nothing: what follows has no place either.
        taken[place] += 1
    return served_TK


def silu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns x sigmoid(x), and its derivative."""
    # The sigmoid, whose derivative is s (1 - s).
    s = 1 / (1 + np.exp(-x))
    return x * s, s * (1 + x * (1 - s))


def gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415), and its
    derivative.
    """
    factor = math.sqrt(2 / math.pi)
    t = np.tanh(factor * (x + 0.044715 * x**3))
    slope = 0.5 * x * (1 - t**2) * factor * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + slope
