"""Our MoE block equals transformers' Mixtral block on random weights: an oracle that does not share our misreadings."""

import jax
import meshes
import numpy as np
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moe_jax.config import Options
from moe_jax.moe.layer import Batch, MoE, MoELayer

D, F, E, B, S = 32, 48, 8, 4, 16


def theirs():
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).float()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.eval()


def weights(block):
    """(gate [D, E], w_in [E, D, 2, F], w_out [E, F, D]) from their fused or separate tensors."""
    gate_up = block.experts.gate_up_proj.detach().numpy()  # [E, 2 F, D]
    down = block.experts.down_proj.detach().numpy()  # [E, D, F]
    w_in = gate_up.reshape(E, 2, F, D).transpose(0, 3, 1, 2)
    return block.gate.weight.detach().numpy().T, w_in, down.transpose(0, 2, 1)


def test_equals_mixtral():
    block = theirs()
    gate, w_in, w_out = weights(block)
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    want = block(torch.tensor(x))
    want = (want[0] if isinstance(want, tuple) else want).detach().numpy()
    options = Options(k=2, softmax="before", renormalize=True, scale=1.0)
    cfg = MoE(E, 1, "top_k", options, "dropless", Options(buffer=0.0), D, F, "swiglu", "float32", "float32", 1.0)
    with jax.set_mesh(meshes.make(2, 2, 2)):
        layer = MoELayer(jax.random.key(0), cfg)
        layer.router.gate[...] = meshes.put(gate, "embed", None)
        layer.experts.w_in[...] = meshes.put(w_in, "experts", "expert_embed", None, "hidden")
        layer.experts.w_out[...] = meshes.put(w_out, "experts", "hidden", "expert_embed")
        ids = meshes.put(np.ones((B, S), np.int32), "batch")
        batch = Batch(ids, ids, ids, meshes.put(np.arange(B, dtype=np.int32), "batch"))
        got, _ = jax.jit(lambda layer, x: layer(x, batch, jax.random.key(0), False))(layer, meshes.put(x, "batch"))
    assert np.abs(np.asarray(got) - want).max() < 1e-5 * max(1, np.abs(want).max())
