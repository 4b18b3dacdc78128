"""docs/clusters.md says what the code has."""

import dataclasses
import re
from pathlib import Path

from moe_jax import exit_codes
from moe_jax.schema.beside import LimitsConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/clusters.md").read_text()
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if "|" in line
]


def test_every_exit_code_is_told():
    codes = {value for name, value in vars(exit_codes).items() if name.isupper()}
    told = {int(code) for row in ROWS for code in re.findall(r"^\d+", row[0])}
    assert codes <= told


def test_every_limit_is_told_with_its_default():
    told = {row[0]: row[1] for row in ROWS if row[0].startswith("`limits.")}
    assert told == {
        f"`limits.{field.name}`": f"{field.default:g} s"
        for field in dataclasses.fields(LimitsConfig)
    }


def test_every_file_that_is_named_is_there():
    named = set(re.findall(r"\b(?:launch|configs)/[\w./]+\w", TEXT)) - {
        "launch/kubernetes/overlays/mine"  # of the reader
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    assert "launch/slurm.sbatch" in named


def test_variables_of_the_launchers_are_those_that_they_read():
    scripts = "".join(path.read_text() for path in (ROOT / "launch").rglob("*") if path.is_file())
    named = set(re.findall(r"MOE_JAX_[A-Z_]+", TEXT))
    assert named and all(f"${{{name}:-" in scripts for name in named)
