"""Matrices in FP8 with a scale for each block of 128 x 128 (DeepSeek-V3) are read as what they say.

They are quantised here, by PyTorch, and decoded bit by bit.
"""

import json

import hf_cases
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_jax.errors import UserError
from moe_jax.interchange import fp8
from moe_jax.interchange.exporting import export_model

# Two blocks and a part of a third, one whole block and a part, less than a block.
SIZES = {"hidden_size": 264, "intermediate_size": 136, "moe_intermediate_size": 40}
SIZES |= {"first_k_dense_replace": 1}
QUANTIZED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
LARGEST = 448.0  # of e4m3


def decoded(byte):
    """The number of a byte of e4m3: a sign, four bits of exponent, three of mantissa."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


def blocks_of(shape):
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            yield row // 128, column // 128, slice(row, row + 128), slice(column, column + 128)


def quantised(weight):
    """(numbers, scales) of a matrix, block by block."""
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-size // 128) for size in weight.shape])
    for i, j, rows, columns in blocks_of(weight.shape):
        block = weight[rows, columns]
        scales[i, j] = block.abs().max() / LARGEST
        numbers[rows, columns] = (block / scales[i, j]).to(torch.float8_e4m3fn)
    return numbers, scales


def dequantised(numbers, scales):
    """What they say, decoded bit by bit, as bfloat16 holds it."""
    values = np.array([decoded(byte) for byte in range(256)])[numbers.view(torch.uint8).numpy()]
    for i, j, rows, columns in blocks_of(numbers.shape):
        values[rows, columns] *= float(scales[i, j])
    return torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)


def test_every_number_times_its_scale():
    # 127 and 255 are no numbers.
    bytes_ = np.array([byte for byte in range(256) if byte & 127 != 127], np.uint8)
    scales = np.array([[0.3, 1.7e-4]], np.float32)
    numbers = np.tile(bytes_, (3, 1))
    have = fp8.unpack(numbers, scales)
    of_column = np.repeat(scales[0].astype(np.float64), 128)[: len(bytes_)]
    exact = np.array([decoded(int(byte)) for byte in bytes_]) * of_column
    want = np.tile(exact.astype(np.float32).astype(ml_dtypes.bfloat16), (3, 1))
    np.testing.assert_array_equal(have, want)


def change(folder, settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a model in FP8, the same as its numbers say)."""
    root = tmp_path_factory.mktemp("fp8")
    model = hf_cases.theirs("deepseek_v3", SIZES)
    packed, plain = (hf_cases.saved(model, root / name) for name in ("packed", "plain"))
    in_fp8, as_said = {}, {}
    for name, tensor in load_file(packed / "model.safetensors").items():
        in_fp8[name] = as_said[name] = tensor
        # Neither the router nor embedding and head.
        if tensor.ndim == 2 and name.endswith("proj.weight") and ".layers." in name:
            numbers, scales = quantised(tensor)
            in_fp8 |= {name: numbers, f"{name}_scale_inv": scales}
            as_said[name] = dequantised(numbers, scales).float()
    save_file(in_fp8, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(as_said, plain / "model.safetensors", metadata={"format": "pt"})
    change(packed, {"quantization_config": QUANTIZED})
    assert sum(name.endswith("_scale_inv") for name in in_fp8) > 20
    return packed, plain


def test_a_model_in_fp8_computes_what_its_numbers_say(folders, tmp_path):
    packed, plain = folders
    run = hf_cases.imported(packed, tmp_path / "ours")
    id_BS = hf_cases.ids()
    want = hf_cases.their_logits(hf_cases.loaded(plain), id_BS)
    have = hf_cases.our_logits(run, id_BS)
    assert np.abs(have - want).max() < 1e-5 * max(1, np.abs(want).max())
    # Written without quantisation: the tensors that the numbers say.
    (tmp_path / "back").mkdir()
    export_model(run, tmp_path / "back", shard_bytes=10**9)
    assert hf_cases.bits(tmp_path / "back") == hf_cases.bits(plain)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


SCALE = "model.layers.0.self_attn.o_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (
            {},
            {"quantization_config": QUANTIZED | {"weight_block_size": [64, 64]}},
            'moe_jax unpacks quant_method "fp8" alone, of fmt "e4m3" and weight_block_size '
            "[128, 128]",
        ),
        (
            {},
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            'moe_jax unpacks quant_method "fp8" alone',
        ),
        (
            {SCALE: torch.ones(3, 2)},
            {},
            f"{SCALE} has the shape [3, 2], and model.layers.0.self_attn.o_proj.weight of "
            "[264, 20] asks for [3, 1]",
        ),
        (
            {"model.layers.0.self_attn.x_proj.weight_scale_inv": torch.ones(1, 1)},
            {},
            "x_proj.weight_scale_inv has no place in a deepseek_v3 model",
        ),
        (
            {SCALE: None},
            {},
            "model.layers.0.self_attn.o_proj.weight is F8_E4M3, and moe_jax reads",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(folders, tmp_path, tensors, settings, message):
    packed, folder = folders[0], tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((packed / "config.json").read_bytes())
    kept = load_file(packed / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, settings)
    with pytest.raises(UserError) as error:
        hf_cases.imported(folder, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
