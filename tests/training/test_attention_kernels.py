"""Whole steps with the attention kernels of JAX."""

import numpy as np
import pytest
import tiny

from moe_jax.models import attention_core


@pytest.mark.full
@pytest.mark.parametrize("name", attention_core.OF_JAX)
def test_a_step_with_a_kernel_of_jax_is_that_with_chunks(name):
    """On a mesh, where its shard_map does not check what varies: gradients are summed as well."""
    rows = []
    for kernel in (name, "chunks"):
        changes = {"model.attention_kernel": kernel, "data.seq_len": 128, "model.repeats": 1}
        changes |= {"model.param_dtype": "float32", "model.dtype": "float32"}
        _, metrics = tiny.Program((2, 2, 2), changes).run(2)
        rows.append([[step["loss"], step["grad_norm"]] for step in metrics])
    np.testing.assert_allclose(*rows, rtol=1e-5)
