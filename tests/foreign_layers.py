"""MoE layers as somebody else would write them, right ones and wrong ones, for
`moe_jax.verify.foreign`.

Shapes: T tokens, K choices, E experts, C places, D model, F hidden; t, e those of one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.verify.foreign import Layer, Output

CAPACITY = 5
SPECS = {name: P("expert") for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")}


def route(logits_TE, k=2, renormalize=True):
    """(experts, gates): the k largest of a softmax."""
    gate_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(logits_TE), k)
    if renormalize:
        gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
    return expert_TK, gate_TK


def experts(x_ECD, inputs):
    """What each expert makes of its own rows."""
    gate = jnp.einsum("ECD,EDF->ECF", x_ECD, inputs.w_gate_EDF)
    up = jnp.einsum("ECD,EDF->ECF", x_ECD, inputs.w_up_EDF)
    return jnp.einsum("ECF,EFD->ECD", jax.nn.silu(gate) * up, inputs.w_down_EFD)


def in_token_order(chosen_TKE):
    """The place of each choice in the queue of its expert: token by token, its choices in turn."""
    flat = chosen_TKE.reshape(-1, chosen_TKE.shape[-1])
    return (jnp.cumsum(flat, 0) - flat).reshape(chosen_TKE.shape)


def in_choice_order(chosen_TKE):
    """All first choices before all second ones: a later token takes the place of an earlier one."""
    T, K, E = chosen_TKE.shape
    flat = chosen_TKE.swapaxes(0, 1).reshape(-1, E)
    return (jnp.cumsum(flat, 0) - flat).reshape(K, T, E).swapaxes(0, 1)


def in_expert_order(chosen_TKE):
    """As many places in all, which the first experts fill: the last ones get what is left."""
    T, _, E = chosen_TKE.shape
    place_TKE = in_token_order(chosen_TKE)
    count_E = chosen_TKE.sum((0, 1))
    before_E = jnp.cumsum(count_E) - count_E
    return jnp.where(before_E[None, None] + place_TKE < E * CAPACITY, place_TKE, T)


def dense_dispatch(inputs, mesh, *, capacity=None, queue=in_token_order, renormalize=True):
    """GShard's dispatch as two einsums: [T, E, C] says which token has which place."""
    expert_TK, gate_TK = route(inputs.logits_TE, renormalize=renormalize)
    num_experts = inputs.logits_TE.shape[1]
    chosen_TKE = jax.nn.one_hot(expert_TK, num_experts, dtype=int)
    chosen_TKE = chosen_TKE * inputs.valid_T[:, None, None]
    places = capacity or inputs.x_TD.shape[0]
    place_TKE = jnp.where(chosen_TKE > 0, queue(chosen_TKE), places)
    has_TKEC = jax.nn.one_hot(place_TKE, places, dtype=inputs.x_TD.dtype)
    dispatch_TEC = has_TKEC.sum(1)
    combine_TEC = jnp.einsum("TKEC,TK->TEC", has_TKEC, gate_TK)
    y_ECD = experts(jnp.einsum("TEC,TD->ECD", dispatch_TEC, inputs.x_TD), inputs)
    y_TD = jnp.einsum("TEC,ECD->TD", combine_TEC, y_ECD)
    dropped_TK = (has_TKEC.sum((2, 3)) == 0) & inputs.valid_T[:, None]
    return Output(y_TD, dropped_TK)


def all_experts(inputs, mesh):
    """Every expert works on every token: GELU experts of given choices, or of a sigmoid whose gates
    are scaled by 2.5.
    """
    expert_TK, gate_TK = inputs.expert_TK, inputs.gate_TK
    if inputs.logits_TE is not None:
        gate_TK, expert_TK = jax.lax.top_k(jax.nn.sigmoid(inputs.logits_TE), 2)
        gate_TK = 2.5 * gate_TK
    hidden_TEF = jax.nn.gelu(jnp.einsum("TD,EDF->TEF", inputs.x_TD, inputs.w_up_EDF))
    chosen_TKE = jax.nn.one_hot(expert_TK, inputs.w_up_EDF.shape[0], dtype=gate_TK.dtype)
    gate_TE = jnp.einsum("TKE,TK->TE", chosen_TKE, gate_TK)
    return jnp.einsum("TE,TEF,EFD->TD", gate_TE, hidden_TEF, inputs.w_down_EFD)


def capped(**more):
    return functools.partial(dense_dispatch, capacity=CAPACITY, **more)


def expert_parallel(inputs, mesh, *, times_axis=False):
    """Every device works on all tokens with its own experts; the results are added up."""

    def on_device(x_TD, router_DE, w_gate, w_up, w_down):
        expert_TK, gate_TK = route(x_TD @ router_DE)
        e = w_up.shape[0]
        local_TK = expert_TK - jax.lax.axis_index("expert") * e
        gate_Te = jnp.einsum("TKe,TK->Te", jax.nn.one_hot(local_TK, e, dtype=x_TD.dtype), gate_TK)
        if times_axis:
            n = jax.lax.axis_size("expert")
            w_gate, w_up, w_down = (
                n * w - jax.lax.stop_gradient((n - 1) * w) for w in (w_gate, w_up, w_down)
            )
        h = jax.nn.silu(jnp.einsum("TD,eDF->TeF", x_TD, w_gate))
        h = h * jnp.einsum("TD,eDF->TeF", x_TD, w_up)
        y_TD = jnp.einsum("Te,TeF,eFD->TD", gate_Te, h, w_down)
        return jax.lax.psum(y_TD, "expert")

    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P("data"), P(), P("expert"), P("expert"), P("expert")),
        out_specs=P("data"),
    )
    weights = inputs.w_gate_EDF, inputs.w_up_EDF, inputs.w_down_EFD
    return run(inputs.x_TD, inputs.router_DE, *weights)


def parallel(**more):
    """`expert_parallel` as a layer, with tokens over `data`."""
    forward = functools.partial(expert_parallel, **more)
    specs = SPECS | {"x_TD": P("data")}
    return Layer(forward, given="router", masks=False, specs=specs)


class Mixtral:
    """The sparse block of Mixtral in transformers, through NumPy, with the gradients of torch."""

    def __init__(self, wide_router=False):
        self.wide_router = wide_router

    def _block(self, inputs):
        """(the block, x, names of `Inputs` -> how the block's gradient is one of them)"""
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        E, D, F = inputs.w_up_EDF.shape
        cfg = MixtralConfig(
            hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
        )
        block = MixtralSparseMoeBlock(cfg).double()
        gate_up = np.concatenate([inputs.w_gate_EDF, inputs.w_up_EDF], 2).swapaxes(1, 2)
        weights = {
            "gate.weight": inputs.router_DE.T,
            "experts.gate_up_proj": gate_up,
            "experts.down_proj": inputs.w_down_EFD.swapaxes(1, 2),
        }
        block.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
        return block, torch.tensor(inputs.x_TD[None], requires_grad=True)

    def forward(self, inputs, mesh):
        block, x = self._block(inputs)
        return self._run(block, x)[0].detach().numpy()

    def _run(self, block, x):
        import torch

        if not self.wide_router:
            return block(x)
        # The router of the block rounds its logits to float32: `Tensor.float` of this call alone
        # keeps them as they are.
        narrow = torch.Tensor.float
        torch.Tensor.float = lambda tensor: tensor
        try:
            return block(x)
        finally:
            torch.Tensor.float = narrow

    def backward(self, inputs, dy_TD, mesh):
        import torch

        block, x = self._block(inputs)
        self._run(block, x)[0].backward(torch.tensor(dy_TD))
        gradients = {name: w.grad.numpy() for name, w in block.named_parameters()}
        gate_up = gradients["experts.gate_up_proj"].swapaxes(1, 2)
        w_gate, w_up = np.split(gate_up, 2, 2)
        return {
            "x_TD": x.grad[0].numpy(),
            "router_DE": gradients["gate.weight"].T,
            "w_gate_EDF": w_gate,
            "w_up_EDF": w_up,
            "w_down_EFD": gradients["experts.down_proj"].swapaxes(1, 2),
        }

    def layer(self):
        more = {"given": "router", "masks": False, "numpy": True}
        return Layer(self.forward, backward=self.backward, **more)
