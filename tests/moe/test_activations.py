"""Activations, against what they are written out, and experts with biases on both kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

from moe_jax.errors import UserError
from moe_jax.moe.activations import ACTIVATIONS, clamped_swiglu
from moe_jax.moe.experts.grouped_matmul import expert_ffn
from moe_jax.parallel.compiling import of_other_platforms

D, F, R, BLOCK = 6, 5, 40, (8, 2)
# Rows of three experts: one has none, rooms lie apart, and the end is nobody's.
START, SIZE = np.array([0, 16, 16], np.int32), np.array([13, 0, 21], np.int32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_what_is_written_out(float64, name):
    """Values and gradients; beyond the bounds of a clamp, too."""
    kind, rng = ACTIVATIONS[name], np.random.default_rng(0)
    parts = [jnp.asarray(3 * rng.normal(size=(7, 5))) for _ in range(kind.parts)]
    options = kind.options(limit=1.5) if name == "clamped_swiglu" else kind.options()

    def both(f):
        y, pull = jax.vjp(lambda *parts: f(options, *parts), *parts)
        return y, *pull(jnp.cos(y))

    want = both(kind.reference)
    for f in (kind.of, kind.lean or kind.of):
        for a, b in zip(both(f), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def draw():
    rng = np.random.default_rng(0)
    shapes = ((R, D), (R,), (3, D, 2, F), (3, F, D), (3, 2, F), (3, D), (R, D))
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def written_out(options, x_RD, gate_R, w_in, w_out, in_bias, out_bias):
    y_RD = jnp.zeros_like(x_RD)
    for expert, (start, size) in enumerate(zip(START, SIZE, strict=True)):
        rows = slice(start, start + size)
        pre = jnp.einsum("RD,DPF->PRF", x_RD[rows], w_in[expert]) + in_bias[expert][:, None]
        hidden = clamped_swiglu.reference(options, *pre)
        y = hidden @ w_out[expert] + out_bias[expert][None]
        y_RD = y_RD.at[rows].set(gate_R[rows, None] * y)
    return y_RD


@pytest.mark.parametrize("others", [False, True])
def test_experts_with_biases(float64, others):
    """Values and all gradients of both kernels; rows that are nobody's stay zero."""
    *args, dy_RD = draw()
    options = clamped_swiglu.Options(alpha=1.3, limit=0.8)

    def ours(x, gate, w_in, w_out, *biases):
        more = {"activation": "clamped_swiglu", "options": options, "biases": biases}
        return expert_ffn(x, gate, START, SIZE, w_in, w_out, block=BLOCK, **more)

    def both(f):
        y, pull = jax.vjp(f, *args)
        return y, *pull(dy_RD)

    want = jax.jit(lambda: both(lambda *args: written_out(options, *args)))()
    if others:
        with of_other_platforms():
            got = jax.jit(lambda: both(ours))()
    else:
        got = jax.jit(lambda: both(ours))()
    names = ("y", "x", "gate", "w_in", "w_out", "in_bias", "out_bias")
    for name, a, b in zip(names, got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)


def test_the_experts_of_gpt_oss(float64):
    """One row for an expert, its gate and up side by side in their matrix."""
    config = GptOssConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=3, num_experts_per_tok=1
    )
    x, _, w_in, w_out, in_bias, out_bias, _ = draw()
    theirs = GptOssExperts(config).double()
    with torch.no_grad():
        theirs.gate_up_proj[:] = torch.tensor(np.asarray(w_in.swapaxes(2, 3).reshape(3, D, 2 * F)))
        theirs.gate_up_proj_bias[:] = torch.tensor(
            np.asarray(in_bias.swapaxes(1, 2).reshape(3, -1))
        )
        theirs.down_proj[:] = torch.tensor(np.asarray(w_out))
        theirs.down_proj_bias[:] = torch.tensor(np.asarray(out_bias))
        chosen, weight = torch.tensor([[0], [2]]), torch.tensor([[0.5], [2.0]]).double()
        want = theirs(torch.tensor(np.asarray(x[:2])), chosen, weight)
    gate_R = jnp.zeros(R).at[0].set(0.5).at[16].set(2.0)
    rows = jnp.zeros((R, D)).at[0].set(x[0]).at[16].set(x[1])
    more = {"activation": "clamped_swiglu", "biases": (in_bias, out_bias), "block": BLOCK}
    got = expert_ffn(rows, gate_R, START, SIZE, w_in, w_out, **more)
    np.testing.assert_allclose(got[jnp.array([0, 16])], want, atol=1e-12)


def test_zeros_and_biases_do_not_go_together():
    changes = {"model.moe.expert_bias": True, "model.moe.sparse.rule": "static"}
    with pytest.raises(UserError) as error:
        tiny.build(changes=changes)
    assert str(error.value).startswith("model.moe.expert_bias = True and model.moe.sparse.rule")
