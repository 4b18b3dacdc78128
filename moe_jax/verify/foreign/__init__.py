"""The checks of the MoE layer for somebody else's layer: a function of arrays on a mesh, in jax or
through NumPy, against plain float64 arithmetic. docs/verify.md has an example.

    report = foreign.check(foreign.Layer(forward, k=2), meshes=[{"expert": 4}])
    report.show()
    assert report.proven
"""

from moe_jax.verify.foreign.contract import Inputs, Layer, Output, Sizes
from moe_jax.verify.foreign.report import Report
from moe_jax.verify.foreign.run import check

__all__ = ["Inputs", "Layer", "Output", "Report", "Sizes", "check"]
