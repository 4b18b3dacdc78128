"""Code that differs by platform: what is traced where the platform is known, and where not."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from moe_jax.parallel.compiling import by_platform, of_other_platforms


def chosen(x):
    return by_platform(x, cpu=jnp.sin, tpu=jnp.cos, others=jnp.tan)


def primitives() -> set[str]:
    """The primitives of the program in a trace of `chosen`, those of branches included."""
    # A new function each time: jax keeps what it traced of an old one.
    jaxpr = jax.make_jaxpr(lambda x: chosen(x))(1.0)
    return {name for name in ("sin", "cos", "tan") if f" {name} " in str(jaxpr)}


def test_a_mesh_says_which_code_is_traced():
    with jax.set_mesh(jax.make_mesh((1,), ("x",), (AxisType.Explicit,))):
        assert primitives() == {"sin"}


def test_without_a_mesh_the_compiler_chooses():
    assert primitives() == {"sin", "cos", "tan"}
    assert jax.jit(chosen)(1.0) == pytest.approx(jnp.sin(1.0))


def test_the_code_of_other_platforms_can_be_asked_for():
    with of_other_platforms():
        assert primitives() == {"tan"}
