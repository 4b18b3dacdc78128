"""The command `bench`: every variant runs, is timed beside the first, and is told with its
parameters.
"""

import re

import pytest

from moe_jax import __main__
from moe_jax.commands import bench
from moe_jax.errors import UserError

SMALL = [
    f"--config.{change}"
    for change in (
        "mesh.data=8",
        "model.d_model=16",
        "model.num_heads=2",
        "model.num_kv_heads=2",
        "model.repeats=1",
        "model.moe.expert_hidden=8",
        "model.ffn_hidden=16",
        "data.seq_len=8",
        "train.batch_size=8",
    )
]


def test_variants_are_timed_in_turn(capsys):
    variants = ["--variant", "e8:", "--variant", "dense: --config.model.period='(\"dense\",)'"]
    flags = ["--config", "base", "--rounds", "2", *SMALL]
    assert __main__.main(["bench", *flags, *variants]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match("(e8|dense) ", line)]
    assert (
        len(lines) == 2
        and re.search(r" 1\.00 ", lines[0])
        and all(line.endswith(" M") for line in lines)
    )


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            "x: --config.model.moe.expert=4",
            "--variant x: no key is called --config.model.moe.expert",
        ),
        (
            "x:model.moe.num_experts=4;model.moe.router='switch'",
            "write --variant 'x: --config.model.moe.num_experts=4 "
            "--config.model.moe.router=switch'",
        ),
        ("x: --config.seed='1", "No closing quotation"),
        ("x: --rounds 3", "write --variant 'x: --config.KEY=VALUE --config.KEY=VALUE'"),
    ],
)
def test_a_mistake_in_a_variant_is_one_line(variant, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bench.main(["--config", "configs/base.py", "--variant", variant])
