"""Experts in MXFP4 are unpacked as transformers unpacks them."""

import json

import hf_cases
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_jax.errors import UserError
from moe_jax.interchange import mxfp4

# Both widths are multiples of the 32 numbers of a block.
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def packed(rng, num_experts, outputs, inputs):
    blocks = rng.integers(0, 256, (num_experts, outputs, inputs // 32, 16)).astype(np.uint8)
    return blocks, rng.integers(114, 124, blocks.shape[:3]).astype(np.uint8)


def test_every_value_is_that_of_transformers():
    blocks, scales = packed(np.random.default_rng(0), 3, 5, 64)
    want = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    got = mxfp4.unpack(blocks, scales)
    np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())


def test_a_packed_model_computes_what_the_unpacked_one_does(tmp_path):
    model = hf_cases.theirs("gpt_oss", SIZES)
    folder = hf_cases.saved(model, tmp_path / "theirs")
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(1)
    state = model.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, inputs, outputs = tensors.pop(name).shape
        blocks, scales = packed(rng, num_experts, outputs, inputs)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            values = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
            state[name].copy_(values.float())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": QUANTIZED}
    path.write_text(json.dumps(config))
    run = hf_cases.imported(folder, tmp_path / "ours")
    id_BS = hf_cases.ids()
    difference = hf_cases.our_logits(run, id_BS) - hf_cases.their_logits(model, id_BS)
    assert np.abs(difference).max() < 1e-5
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match='moe_jax unpacks quant_method "mxfp4" alone'):
        hf_cases.imported(folder, tmp_path / "no")
