"""The command `bench`: every variant runs, is timed beside the first, and is told with its
parameters.
"""

import re

import pytest

from moe_jax import __main__
from moe_jax.commands import bench
from moe_jax.errors import UserError

SMALL = (
    "mesh.data=8;model.d_model=16;model.num_heads=2;model.num_kv_heads=2;model.repeats=1;model.moe.expert_hidden=8;"
    "model.ffn_hidden=16;data.seq_len=8;train.batch_size=8"
)


def test_variants_are_timed_in_turn(capsys):
    variants = ["--variant", f"e8:{SMALL}", "--variant", f'dense:{SMALL};model.period=("dense",)']
    assert __main__.main(["bench", "--config", "configs/base.py", "--rounds", "2", *variants]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match("(e8|dense) ", line)]
    assert (
        len(lines) == 2
        and re.search(r" 1\.00 ", lines[0])
        and all(line.endswith(" M") for line in lines)
    )


def test_a_misspelt_key_is_named():
    with pytest.raises(UserError, match=r"--variant model\.moe\.expert=4"):
        bench.main(["--config", "configs/base.py", "--variant", "x:model.moe.expert=4"])
