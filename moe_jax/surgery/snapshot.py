"""The whole state of a run on the host, to be changed and written as a run that trains on.

Arrays have the names that they have on disk: "params/embed",
"opt_state/direction/mu/repeats/0/blocks/0/moe/experts/w_in". Layers are single there, whatever
model.scan says.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_jax import checkpoint, optim
from moe_jax.checkpoint import flat
from moe_jax.checkpoint.array_files import load_arrays, read_manifest
from moe_jax.errors import UserError
from moe_jax.models.functions import make_model
from moe_jax.moe import sparse
from moe_jax.parallel import mesh as meshes
from moe_jax.run import Run, checkpoints, for_one_device
from moe_jax.schema.config import Config
from moe_jax.surgery.weights import Weights
from moe_jax.train_step import initial, jit_initial

Arrays = dict[str, np.ndarray]
# Parts of a state that hold values of parameters.
VALUES = ("params", "ema", "master")
# Parts that a model without its training has.
OF_MODEL = ("params", "router_state")


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A run at one step.

    Fields:
      raw: the config, a nested dict of JSON values.
      arrays: by their names on disk.
      metadata: of the checkpoint; with a fingerprint "data" where a run was trained.
    """

    raw: dict[str, Any]
    arrays: Arrays
    step: int
    metadata: dict[str, Any]

    @property
    def trains_on(self) -> bool:
        """Returns True where the state is that of a training run, and not of a model alone."""
        return isinstance(self.metadata.get("data"), str) and "step" in self.arrays

    @property
    def config(self) -> Config:
        """Returns the frozen config, for one device and with single layers."""
        return for_one_device(self.raw, Path("."))


def read(run: Run) -> Snapshot:
    """Returns the state of a run. Raises UserError where its files are damaged."""
    if run.config.model.moe.sparse.stored.block:
        raise UserError(
            f"{run.workdir} has experts stored as blocks, which cannot be trained or taken apart: "
            "name the run that `convert compact` read"
        )
    saves = checkpoints(run.workdir)
    # Its files are verified here.
    path = saves.path(run.step)
    # On the host, whatever accelerator there is: what follows is NumPy.
    place = SingleDeviceSharding(meshes.of_host().devices.flat[0])
    wanted = {}
    for name, (shape, dtype) in read_manifest(path)["arrays"].items():
        wanted[name] = jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype), sharding=place)
    # Of a run in float64 jax must be told before it reads.
    arrays = {name: np.asarray(x) for name, x in load_arrays(path, wanted).items()}
    return Snapshot(run.raw, arrays, run.step, saves.metadata(run.step))


def write(workdir: Path, made: Snapshot) -> None:
    """Writes a run into a new directory: one checkpoint, and config.json.

    Raises ValueError where the arrays are not those of the config: a fault of ours.
    """
    _refuse_misfits(made)
    workdir.mkdir(parents=True, exist_ok=True)
    saves = checkpoint.Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)
    # Orbax writes arrays of jax.
    place = meshes.of_host().devices.flat[0]
    arrays = {name: jax.device_put(x, place) for name, x in made.arrays.items()}
    metadata = {**made.metadata, "config": made.raw}
    saves.save(made.step, arrays, metadata=metadata, score=None, stacked=False, frugal=True)
    saves.close()
    text = json.dumps(made.raw, indent=1)
    (workdir / "config.json").write_text(text + "\n", encoding="utf-8")


def abstract(cfg: Config) -> dict[str, Any]:
    """Returns shape and dtype of every array of a training run, by its name on disk.

    `cfg`: of one device and with single layers.
    """
    with jax.set_mesh(meshes.of_host()):
        init = initial(cfg, make_model(cfg.model))
        return flat.flatten(jax.eval_shape(init, jax.random.key(cfg.seed)))


def fresh(cfg: Config) -> Arrays:
    """Returns the arrays of a training run before its first step, by their names on disk."""
    with jax.set_mesh(meshes.of_host()):
        state = jit_initial(cfg, make_model(cfg.model))(jax.random.key(cfg.seed))
        return {name: np.asarray(x) for name, x in flat.flatten(state).items()}


def weights(made: Snapshot, arrays: Mapping[str, np.ndarray]) -> Weights:
    """Returns the model of a snapshot with other values of its arrays, such as wider ones."""
    with jax.set_mesh(meshes.of_host()):
        model = make_model(made.config.model)
        like = dict(zip(OF_MODEL, jax.eval_shape(model.init, jax.random.key(0)), strict=True))
    parts = {}
    for part, tree in like.items():
        of_part = {name: arrays[f"{part}/{name}"] for name in flat.flatten(tree)}
        parts[part] = flat.unflatten(of_part, tree)
    return Weights(made.raw, parts, made.step)


def with_rounded_masters(cfg: Config, arrays: Arrays) -> Arrays:
    """Returns the arrays with parameters that are their master copies, rounded."""
    made = dict(arrays)
    for name, x in arrays.items():
        if cfg.optim.master_copy and name.startswith("master/"):
            param = "params/" + name.removeprefix("master/")
            # As a step leaves them: the master copy is what the optimizer moves.
            made[param] = x.astype(made[param].dtype)
    return made


def finished(cfg: Config, arrays: Arrays) -> Arrays:
    """Returns the arrays with the first zeros of sparse experts and their masks, and parameters
    that are their master copies, rounded.
    """
    made = with_rounded_masters(cfg, arrays)
    if cfg.model.moe.sparse.dense:
        return made
    with jax.set_mesh(meshes.of_host()):
        like = jax.eval_shape(make_model(cfg.model).init, jax.random.key(0))[0]
        values = {name: jax.numpy.asarray(made[f"params/{name}"]) for name in flat.flatten(like)}
        params = flat.unflatten(values, like)
        params, masks = sparse.begin(cfg.model.moe.sparse, params, stacked=False)
        trees = {"params": params, "masks": masks}
        # An average, or a wider copy, has the same zeros.
        if cfg.optim.ema_decay:
            trees["ema"] = optim.begin_ema(params)
        if cfg.optim.master_copy:
            trees["master"] = optim.wide_copy(params)
        for part, tree in trees.items():
            made |= {f"{part}/{name}": np.asarray(x) for name, x in flat.flatten(tree).items()}
    return made


def names_of_model(arrays: Mapping[str, Any]) -> set[str]:
    """Returns the names of parameters and router state, without the part they are of."""
    split = (name.partition("/") for name in arrays)
    return {name for part, _, name in split if part in OF_MODEL}


def owner(name: str, known: set[str]) -> str:
    """Returns the parameter (or router state) that an array belongs to; "" for none.

    "opt_state/direction/mu/ends/embed" belongs to "ends/embed". The longest name that is found
    counts.
    """
    parts = name.split("/")
    for length in range(len(parts) - 1, 0, -1):
        for start in range(1, len(parts) - length + 1):
            inner = "/".join(parts[start : start + length])
            if inner in known:
                return inner
    return ""


def _refuse_misfits(made: Snapshot) -> None:
    """Raises ValueError where the arrays are not those that a run of this config has."""
    wanted = abstract(made.config)
    if not made.trains_on:
        wanted = {name: x for name, x in wanted.items() if name.partition("/")[0] in OF_MODEL}
    here = {name: x for name, x in made.arrays.items() if made.trains_on or name in wanted}
    for name in sorted(wanted.keys() | here.keys()):
        shapes = [
            (tuple(of[name].shape), str(of[name].dtype)) if name in of else None
            for of in (wanted, here)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[1]}, and its config asks for {shapes[0]}")
