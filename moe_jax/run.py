"""A finished run: what training left in a directory, as objects.

    run = moe_jax.load_run("runs/quickstart")
    with jax.set_mesh(run.mesh):
        outputs = run.model(...)

`generate`, `probe`, `convert` and notebooks take a run from here.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax import checkpoint, config
from moe_jax.config import config_file, smoke
from moe_jax.data import tokenizer as tokenizers
from moe_jax.errors import UserError
from moe_jax.models.functions import Model, make_model
from moe_jax.parallel import mesh as meshes
from moe_jax.runtime import shell
from moe_jax.schema.config import Config


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A checkpoint of a training run.

    Arrays lie on the mesh that is set when they are read, and on one device where none is set.

    Fields:
      workdir: the --workdir of the run.
      step: of the checkpoint.
      config: frozen, for one device and with single layers (model.scan = False), as checkpoints
        store them.
      raw: the config as training wrote it, a nested dict of JSON values, with the defaults of keys
        that were added since.
      notes: what a reader should know: keys with new defaults, that it is a smoke run.
    """

    workdir: Path
    step: int
    config: Config
    raw: dict[str, Any]
    notes: tuple[str, ...]

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Returns the mesh that was set when this was first called; one device where none was."""
        current = jax.sharding.get_mesh()
        return meshes.make(meshes.ONE, jax.devices()[:1]) if current.empty else current

    @functools.cached_property
    def functions(self) -> Model:
        """Returns the model as functions: `init(key)` and `bind(parameters, router_state)`."""
        with jax.set_mesh(self.mesh):
            return make_model(self.config.model)

    @functools.cached_property
    def parameters(self) -> Any:
        """Returns the parameters, a nested dict of arrays."""
        return self._read("params", 0)

    @functools.cached_property
    def moving_average(self) -> Any:
        """Returns the moving average of the parameters; None where the run kept none
        (optim.ema_decay = 0).
        """
        return self._read("ema", 0) if self.config.optim.ema_decay else None

    @functools.cached_property
    def router_state(self) -> Any:
        """Returns what routers keep without a gradient, a nested dict of arrays."""
        return self._read("router_state", 1)

    @property
    def judged(self) -> Any:
        """Returns the parameters that evaluation uses: the moving average where there is one."""
        return self.moving_average if self.config.optim.ema_decay else self.parameters

    @functools.cached_property
    def model(self) -> Any:
        """Returns the model with the parameters that evaluation uses; call it with `mesh` set."""
        with jax.set_mesh(self.mesh):
            return self.functions.bind(self.judged, self.router_state)

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer of a language model, read when it is first asked for.

        Raises UserError when the run has none, or one with more ids than the model has.
        """
        tokenizer = tokenizers.load(self.workdir / "tokenizer")
        # JAX would take an id that the embedding lacks for its last one.
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise UserError(
                f"{self.workdir / 'tokenizer'} has {tokenizer.vocab_size} ids ({tokenizer.name}), "
                f"but the model of this run has {self.config.model.vocab_size} "
                "(model.vocab_size): put the tokenizer back that the run was trained with"
            )
        return tokenizer

    def at(self, step: int) -> "Run":
        """Returns the same run at another checkpoint. Raises UserError when there is none."""
        checkpoints(self.workdir).path(step)
        return dataclasses.replace(self, step=step)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order; their files are not verified."""
        return checkpoints(self.workdir).steps()

    def _read(self, part: str, index: int) -> Any:
        """Returns one part of the checkpoint. `index`: of its shapes in what `init` returns."""
        directory = self.workdir / "checkpoints"
        with jax.set_mesh(self.mesh):
            # Shapes and placements of this part; nothing is computed.
            like = jax.eval_shape(self.functions.init, jax.random.key(0))[index]
            # Routers without a state have nothing on disk.
            if not jax.tree.leaves(like):
                return like
            values, report = checkpoint.load_params(
                directory, like, stacked=False, rename={}, part=part, step=self.step
            )
        # Another run may lack parameters, this run's own checkpoint may not.
        if report.left:
            name, reason = report.left[0]
            raise UserError(
                f"the checkpoint of step {self.step} in {directory} does not fit config.json: "
                f"{name}: {reason}"
            )
        return values


def load_run(workdir: str | Path, step: int | None = None) -> Run:
    """Returns a run of training with its arrays read: to be analysed, or to continue a text.

    Prints its notes to standard error. A model in float64 turns jax_enable_x64 on.

    Args:
      workdir: the --workdir of the training run.
      step: of the checkpoint; None = the newest that is whole.

    Raises UserError when there is no run or no such checkpoint, or when a file is damaged.
    """
    run = open_run(workdir, step)
    # Each is read when it is first asked for, which is here.
    _ = run.parameters, run.moving_average, run.router_state, run.model
    return run


def open_run(workdir: str | Path, step: int | None = None, *, silent: bool = False) -> Run:
    """Returns a run whose arrays and tokenizer are read when they are first asked for.

    For a reader that needs some of them, or that chooses the mesh by the config. Not inside of
    jax.jit, where no mesh can be set. `silent`: without printing the notes.
    """
    workdir = Path(workdir)
    raw, notes = read_raw(workdir)
    cfg = for_one_device(raw, workdir)
    if not silent:
        for note in notes:
            shell.tell(note, sys.stderr)
    saves = checkpoints(workdir)
    # `latest` verifies the files of what it returns, `path` those of a given step.
    if step is None:
        step = saves.latest()
    else:
        saves.path(step)
    if step is None:
        raise UserError(
            f"there is no checkpoint in {workdir / 'checkpoints'} yet: the first comes after "
            "checkpoint.every steps of training"
        )
    return Run(workdir, step, cfg, raw, tuple(notes))


def write_run(workdir: Path, raw: dict[str, Any], parts: Mapping[str, Any], step: int) -> None:
    """Writes a run that `open_run` and train.init_from read: one checkpoint without a state of the
    optimizer, and config.json.

    Args:
      workdir: a new directory.
      raw: the config, a nested dict of JSON values.
      parts: trees of arrays with single layers, on any device: "params", "router_state", and "ema"
        where the config has one.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    # every=0: nothing is saved but by the call below.
    saves = checkpoint.Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)
    # A checkpoint as training writes it, without the moments.
    arrays = {"step": jax.numpy.int32(step), **parts}
    # A Run has its layers unstacked, whatever model.scan says.
    metadata = {"config": raw}
    saves.save(step, arrays, metadata=metadata, score=None, stacked=False, frugal=True)
    saves.close()
    # Last: a directory with config.json is a run, and its checkpoint is there by then.
    (workdir / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def checkpoints(workdir: Path) -> checkpoint.Checkpoints:
    """Returns the checkpoints of a run, to be read."""
    return checkpoint.Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)


def read_raw(workdir: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the config that training wrote, with the defaults of keys that were added since, and
    notes.
    """
    path = workdir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} holds no run, because {path} cannot be read ({error.strerror}): "
            "name the --workdir of a training run"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): start the run again, which rewrites it"
        ) from None
    raw, notes = checkpoint.fill(raw, config_file.default_values(), config.RESUME_MAY_CHANGE)
    return raw, notes + smoke.notes(raw, workdir)


def for_one_device(raw: dict[str, Any], workdir: Path) -> Config:
    """Returns the frozen config of a run on one device, whatever mesh it was trained on.

    The layers are single, as they are on disk and as sampling wants them.
    """
    config.allow_float64(raw)
    # scan and mesh change how a model is computed, and not what.
    model = {**raw.get("model", {}), "scan": False}
    one = meshes.ONE.written()
    return config.build({**raw, "model": model, "mesh": one, "simulate_devices": 0}, 1)
