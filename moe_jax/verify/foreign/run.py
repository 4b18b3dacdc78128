"""Runs a foreign layer on every case and mesh, and compares it with plain arithmetic.

Shapes as in contract.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.parallel.compiling import QUICK
from moe_jax.verify.compare import far, largest, relative_gradients, unequal
from moe_jax.verify.foreign.arithmetic import Expected, expected
from moe_jax.verify.foreign.cases import Case, cases
from moe_jax.verify.foreign.contract import WITHOUT_GRADIENT, Inputs, Layer, Output, Sizes
from moe_jax.verify.foreign.report import Finding, Report, mesh_name
from moe_jax.verify.run import line_of

SIZES = Sizes()
# (inputs, dy) -> (output, gradients by name); None = the layer has none.
Run = Callable[[Inputs, np.ndarray], tuple[Output, Mapping[str, Any] | None]]


def check(
    layer: Layer,
    meshes: Sequence[Mapping[str, int]] = (),
    sizes: Sizes = SIZES,
    seed: int = 0,
) -> Report:
    """Compares a layer with plain float64 arithmetic, on one device and on meshes.

    Args:
      layer: the function, and what it says of itself.
      meshes: {name of an axis: its length}, as the layer knows them. On one device all of these
        axes are of length one.
      sizes: of the arrays.
      seed: of the random numbers.

    Returns the report: `proven`, `verdict()`, `show()`, `write(path)`. What the layer raises is
    part of it.

    Raises UserError for sizes that do not go together, and for a mesh of more devices than there
    are.
    """
    if sizes.experts <= layer.k:
        raise UserError(
            f"foreign.check: sizes.experts ({sizes.experts}) must be more than Layer.k ({layer.k})"
        )
    # The layer may name any axis on any mesh: one that a mesh does not name is of length 1, behind
    # those that it names.
    ones = dict.fromkeys([*(axis for mesh in meshes for axis in mesh), *_axes(layer)], 1)
    shapes = [ones or {"expert": 1}, *({**mesh, **ones, **mesh} for mesh in meshes)]
    for shape in shapes:
        _refuse_large(shape)
    tried = cases(layer, sizes, seed)
    wanted = [expected(case.inputs, layer, case.dy_TD) for case in tried]
    findings, failures = [], {}
    for shape in shapes:
        name = mesh_name(shape)
        try:
            run = _runner(layer, shape)
            for case, want in zip(tried, wanted, strict=True):
                findings += _compare(layer, name, case, want, *run(case.inputs, case.dy_TD))
        # Whatever a layer raises is a result: the other meshes are still tried.
        except Exception as error:
            failures[name] = line_of(error)
    return Report(layer, sizes, seed, findings, failures, _dropped(tried, wanted))


def _dropped(tried: Sequence[Case], wanted: Sequence[Expected]) -> tuple[int, int]:
    """Returns how many choices of all cases have no place, and how many there are."""
    dropped = sum(want.dropped_TK.sum() for want in wanted)
    choices = sum(
        case.inputs.valid_T.sum() * want.dropped_TK.shape[1]
        for case, want in zip(tried, wanted, strict=True)
    )
    return int(dropped), int(choices)


def _axes(layer: Layer) -> list[str]:
    """Returns the axes that the specs of a layer name."""
    parts = [part for spec in layer.specs.values() for part in spec if part is not None]
    return [axis for part in parts for axis in ((part,) if isinstance(part, str) else part)]


def _refuse_large(shape: Mapping[str, int]) -> None:
    """Raises UserError where jax has fewer devices than a mesh."""
    wanted, there = int(np.prod(list(shape.values()))), len(jax.devices())
    if wanted > there:
        raise UserError(
            f"foreign.check: the mesh {mesh_name(shape)} needs {wanted} devices, and jax has "
            f"{there}: moe_jax.parallel.mesh.simulate({wanted}), called before anything else that "
            "uses jax, simulates them"
        )


def _runner(layer: Layer, shape: Mapping[str, int]) -> Run:
    """Returns what runs the layer on a mesh."""
    devices = np.array(jax.devices()[: int(np.prod(list(shape.values())))])
    types = (AxisType.Auto,) * len(shape)
    mesh = Mesh(devices.reshape(*shape.values()), tuple(shape), axis_types=types)
    return _through_numpy(layer, mesh) if layer.numpy else _through_jax(layer, mesh)


def _through_numpy(layer: Layer, mesh: Mesh) -> Run:
    """Returns what runs a layer that takes arrays of NumPy."""

    def run(inputs: Inputs, dy_TD: np.ndarray):
        # A layer may write into what it is given.
        given, dy = jax.tree.map(np.array, (_narrow(layer, inputs), _narrow(layer, dy_TD)))
        output = _output(layer.forward(given, mesh))
        if layer.backward is None:
            return output, None
        return output, layer.backward(given, dy, mesh)

    return run


def _through_jax(layer: Layer, mesh: Mesh) -> Run:
    """Returns what runs a layer of jax, compiled for a mesh."""

    def outputs(inputs: Inputs, dy_TD: jax.Array):
        # What a gradient is taken of.
        moving = {}
        for name, value in inputs._asdict().items():
            if value is not None and name not in WITHOUT_GRADIENT:
                moving[name] = value

        def loss(moving: Mapping[str, jax.Array]):
            output = _output(layer.forward(inputs._replace(**moving), mesh))
            # Its gradient is the pullback of dy.
            return jnp.vdot(output.y_TD, dy_TD), output

        if layer.backward is None:
            gradients, output = jax.grad(loss, has_aux=True)(moving)
            return output, gradients
        return loss(moving)[1], layer.backward(inputs, dy_TD, mesh)

    # One program for all cases of a mesh.
    compiled = jax.jit(outputs, compiler_options=QUICK)

    def run(inputs: Inputs, dy_TD: np.ndarray):
        with jax.set_mesh(mesh), jax.enable_x64(layer.dtype == "float64"):
            placed = {}
            for name, value in _narrow(layer, inputs)._asdict().items():
                spec = layer.specs.get(name, PartitionSpec())
                sharding = NamedSharding(mesh, spec)
                placed[name] = None if value is None else jax.device_put(value, sharding)
            # The gradient of the output lies as the tokens do.
            spec = layer.specs.get("x_TD", PartitionSpec())
            dy = jax.device_put(_narrow(layer, dy_TD), NamedSharding(mesh, spec))
            return jax.device_get(compiled(Inputs(**placed), dy))

    return run


def _narrow(layer: Layer, tree: Any) -> Any:
    """Returns arrays with their numbers in the dtype of the layer."""
    return jax.tree.map(lambda z: z.astype(layer.dtype) if z.dtype == np.float64 else z, tree)


def _output(returned: Any) -> Output:
    """Returns what a layer returned as an Output."""
    return returned if isinstance(returned, Output) else Output(returned)


def _compare(
    layer: Layer,
    mesh: str,
    case: Case,
    want: Expected,
    output: Output,
    gradients: Mapping[str, Any] | None,
) -> list[Finding]:
    """Returns how far a layer is from plain arithmetic on one mesh and case."""
    limits = layer.limits
    valid_T = case.inputs.valid_T
    y_TD = _of_shape(output.y_TD, want.y_TD, "the output")
    # Padding may be anything, so only valid tokens are compared.
    # Over the largest number, for single ones may be near 0.
    scale = np.abs(want.y_TD).max()
    value = far(want.y_TD[valid_T], y_TD[valid_T], scale)
    found = [Finding(mesh, case.claim, "output", value, limits["output"], "")]
    if output.dropped_TK is not None:
        have_TK = _of_shape(output.dropped_TK, want.dropped_TK, "dropped_TK").astype(bool)
        value = unequal(want.dropped_TK[valid_T], have_TK[valid_T])
        found.append(Finding(mesh, case.claim, "drops", value, limits["drops"], ""))
    if gradients is not None:
        # A layer may return more gradients than are compared, and no fewer.
        absent = sorted(set(want.gradients) - set(gradients))
        if absent:
            raise ValueError(f"Layer.backward returned no gradient of {absent[0]}")
        have = {
            name: _of_shape(gradients[name], gradient, f"the gradient of {name}")
            for name, gradient in want.gradients.items()
        }
        where, value = largest(relative_gradients(want.gradients, have))
        found.append(Finding(mesh, case.claim, "gradient", value, limits["gradient"], where))
    return found


def _of_shape(have: Any, want: np.ndarray, what: str) -> np.ndarray:
    """Returns an array in NumPy. ValueError when it has another shape: it could be broadcast."""
    array = np.asarray(have)
    if array.shape != want.shape:
        raise ValueError(f"{what} has the shape {array.shape}, and should have {want.shape}")
    return array
