"""Proof that a config computes the same on every mesh: `python -m moe_jax verify`, and
`from_config` in a program. `verify.foreign` has the checks of a layer that is not ours.
docs/verify.md tells what is checked.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_jax.verify.run import Result


def from_config(
    config: str, *changes: str, meshes: Sequence[str] = ("2x2x2",), steps: int = 2
) -> "Result":
    """Returns what was compared: `proven`, and `rows` with the deviations of each mesh.

    Simulates eight CPU devices, or as many as the largest mesh has, and computes in float64. So it
    comes before anything else that uses jax in the process; other programs want jax_enable_x64 off
    again after it.

    Args:
      config: a config file, or the name of a shipped config.
      changes: as on a command line, "--config.KEY=VALUE".
      meshes: "DATAxEXPERTxMODEL" or "STAGExDATAxEXPERTxSEQxMODEL" each.
      steps: optimizer steps that are compared.

    Raises UserError for a config that is refused by its rules.
    """
    # Imported here, because these modules are in the package that is being imported.
    from pathlib import Path

    from moe_jax.config import command_line
    from moe_jax.parallel import mesh
    from moe_jax.verify import run

    raw = command_line.read(Path(config), changes)
    shapes = [mesh.parse(text, "meshes") for text in meshes]
    wanted = run.Wanted(shapes, steps, processes=1, float32=False)
    return run.prove(raw, wanted, say=lambda text: None)
