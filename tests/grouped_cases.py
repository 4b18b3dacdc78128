"""What every kernel of the experts is compared with: all experts on all rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def all_experts(x_RD, gate_R, start_e, size_e, w_in_eDPF, w_out_eFD, *, activation):
    """Every expert on every row, and only then the choice."""
    row_R = jnp.arange(x_RD.shape[0], dtype=start_e.dtype)
    owner_eR = (row_R[None] >= start_e[:, None]) & (row_R[None] < (start_e + size_e)[:, None])
    x_RD = jnp.where(jnp.any(owner_eR, axis=0)[:, None], x_RD, 0)  # or the garbage overflows
    pre_PeRF = jnp.einsum("RD,eDPF->PeRF", x_RD, w_in_eDPF)
    if activation == "swiglu":
        h_eRF = pre_PeRF[0] / (1 + jnp.exp(-pre_PeRF[0])) * pre_PeRF[1]
    else:
        inner = math.sqrt(2 / math.pi) * (pre_PeRF[0] + 0.044715 * pre_PeRF[0] ** 3)
        h_eRF = 0.5 * pre_PeRF[0] * (1 + jnp.tanh(inner))
    h_eRF = jnp.where(owner_eR[..., None], h_eRF * gate_R[None, :, None], 0)
    return jnp.einsum("eRF,eFD->RD", h_eRF, w_out_eFD)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(f, args, dy_RD):
    """(y, cotangents of x, gate, w_in, w_out)."""
    x, gate, start, size, w_in, w_out = args

    def run(x, gate, w_in, w_out):
        return f(x, gate, start, size, w_in, w_out)

    y_RD, pull = jax.vjp(run, x, gate, w_in, w_out)
    return y_RD, *pull(dy_RD)


def assert_near(got, want, tolerance):
    """Every array within `tolerance` of its own largest entry."""
    for name, a, b in zip(("y", "x", "gate", "w_in", "w_out"), got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-3), err_msg=name
        )
