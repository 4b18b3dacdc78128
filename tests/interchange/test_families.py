"""Every family with every option of its config: logits are those of transformers, both ways, and a
round trip changes no bit.
"""

import hf_cases
import numpy as np
import pytest

from moe_jax.interchange.exporting import export_model

LIMIT = 1e-5


def marked(case):
    return pytest.param(case, marks=() if hf_cases.is_quick(case) else pytest.mark.full)


@pytest.mark.parametrize("case", [marked(case) for case in hf_cases.CASES])
def test_a_model_computes_the_same_in_both_and_comes_back_bit_for_bit(case, tmp_path):
    family, changes = hf_cases.CASES[case]
    model = hf_cases.theirs(family, changes)
    hf_cases.saved(model, tmp_path / "theirs")
    run = hf_cases.imported(tmp_path / "theirs", tmp_path / "ours")
    id_BS = hf_cases.ids()
    expected = hf_cases.their_logits(model, id_BS)
    logits = hf_cases.our_logits(run, id_BS)
    assert np.abs(expected).max() > 0.5
    assert np.abs(logits - expected).max() < LIMIT
    (tmp_path / "back").mkdir()
    done = export_model(run, tmp_path / "back", shard_bytes=2_000)
    assert done.family == family
    assert hf_cases.bits(tmp_path / "back") == hf_cases.bits(tmp_path / "theirs")
    again = hf_cases.loaded(tmp_path / "back")
    assert np.abs(hf_cases.their_logits(again, id_BS) - expected).max() == 0
