"""Another number of devices: the first of mesh_fallbacks that fits is the mesh."""

import pytest
import tiny

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import Lengths

MESH = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2}
FALLBACKS = {"mesh_fallbacks": ("2x2x1", "4x1x1", "2x1x1")}


@pytest.mark.parametrize(
    ("devices", "lengths"),
    [
        (8, Lengths(data=2, expert=2, model=2)),
        (4, Lengths(data=2, expert=2)),
        (2, Lengths(data=2)),
    ],
)
def test_the_first_that_fits_is_taken(devices, lengths):
    assert config.build(tiny.raw(MESH | FALLBACKS), devices).mesh == lengths


def test_without_one_that_fits_the_mesh_itself_is_refused():
    with pytest.raises(UserError, match="does not make 3 devices"):
        config.build(tiny.raw(MESH | FALLBACKS), 3)


def test_a_fallback_is_written_as_a_mesh():
    with pytest.raises(UserError, match=r"mesh_fallbacks 2x2: write DATAxEXPERTxMODEL"):
        config.build(tiny.raw(MESH | {"mesh_fallbacks": ("2x2",)}), 8)
