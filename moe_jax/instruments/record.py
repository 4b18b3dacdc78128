"""The routing of chosen steps, token by token, in compact files that are the same for every mesh.

    workdir/routing/manifest.json        what the run is, what each file holds
    workdir/routing/step_00000100.npz    of the batch that step 100 took

A file has, for L MoE layers, R rows of the batch, S tokens and K choices of a token (K =
num_experts, in their order, where a router has no fixed number of choices): "expert" [L, R, S, K]
(num_experts = nowhere: padding, an unused place), "gate" (float16), "dropped" (chosen, but the
expert had no place); "token", "segment" (a document; 0 = padding) and "domain" [R, S]. Integers
have the smallest type that holds them.

The record is a forward pass of its own, with the randomness of the step: a run that records nothing
pays nothing. Numbers that are not integers may differ between meshes in their last bit, and in
float32 a tie may be decided differently; in float64 the files are equal.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import layout
from moe_jax.data.batches import PackedText
from moe_jax.errors import UserError
from moe_jax.moe import probe
from moe_jax.parallel.mesh import P
from moe_jax.schema.blocks import inner, is_depth
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.tasks.lm import task as lm
from moe_jax.train_step import Model, State, micro_batches, step_key

MANIFEST = "manifest.json"
# The blocks of the config that make the routing; the mesh is none of them.
SAME_RUN = ("seed", "model", "optim", "data")
# Keys in them that change no value.
SAME_VALUES = (
    "scan",
    "remat",
    "remat_offload",
    "prefetch",
    "expert_kernel",
    "attention_kernel",
    "loss_chunk",
)


def make_recorder(
    cfg: Config, model: Model, domains: Sequence[str], directory: Path
) -> Callable[[int, State, PackedText], None]:
    """Returns (step, state before it, its batch) -> None, which writes the file of the step if
    `record.steps` asks for it. All processes call it.
    """
    if cfg.record.steps:
        refuse_unrecordable(cfg.model)
    num_micro, group_rows = cfg.train.num_micro_batches, cfg.model.moe.group_rows
    num_rows = cfg.record.rows or cfg.train.batch_size

    @jax.jit
    def record_of(state: State, batch: PackedText) -> Any:
        rng = step_key(cfg, state.step)
        bound = model.bind(state.params, state.router_state)

        def record_part(_, part):
            # In training mode and with the key of the step: this is the routing that it takes.
            record = lm.record(bound, part, rng, True, probe.ROUTING)
            return None, jax.sharding.reshard(record, P())

        # Split as the step splits it, so that capacity and order are those of the step.
        parts = micro_batches(batch, num_micro, group_rows)
        _, fields = jax.lax.scan(record_part, None, parts)
        in_order = {name: _rows_in_order(z, num_micro, group_rows) for name, z in fields.items()}
        return in_order, jax.sharding.reshard(batch, P())

    def recorder(step: int, state: State, batch: PackedText) -> None:
        if not cfg.record.steps(step):
            return
        fields, whole_batch = jax.device_get(record_of(state, batch))
        if jax.process_index() == 0:
            arrays = compact(fields, whole_batch, cfg.model.moe.num_experts, num_rows)
            write_step(directory, step, arrays, about(cfg, domains))

    return recorder


def refuse_unrecordable(cfg: ModelConfig) -> None:
    """Raises UserError for a model whose routing is not of every token: without MoE layers, or with
    a mixture of depths around one.
    """
    if not cfg.num_moe_layers:
        raise UserError(
            "the model has no MoE layer, so there is no routing to look at (record.steps)"
        )
    deep = [kind for kind in cfg.blocks if inner(kind) == "moe" and is_depth(kind)]
    if deep:
        raise UserError(
            f'only some tokens go through a block "{deep[0]}": their routing cannot be recorded by '
            "token"
        )


def _rows_in_order(z: jax.Array, num_micro: int, group_rows: int) -> jax.Array:
    """Returns [L, B, ...] from [num_micro, L, B / num_micro, ...]: the inverse of `micro_batches`,
    which deals out whole groups of rows.
    """
    z = jnp.moveaxis(z, 0, 1)
    num_layers, _, rows, *rest = z.shape
    # [L, num, n, group_rows, ...]: micro-batch by micro-batch, n groups in each.
    z = z.reshape(num_layers, num_micro, rows // group_rows, group_rows, *rest)
    # [L, n, num, group_rows, ...]: as the groups lay in the batch.
    z = jnp.swapaxes(z, 1, 2)
    return z.reshape(num_layers, -1, *rest)


def compact(
    fields: dict[str, np.ndarray], batch: Any, num_experts: int, rows: int
) -> dict[str, np.ndarray]:
    """Returns the arrays of a file from a record [L, B, S, K] and its batch, of the first `rows`
    rows.
    """

    arrays = {
        # num_experts itself occurs: it stands for "nowhere".
        "expert": fields["expert"][:, :rows].astype(np.min_scalar_type(num_experts)),
        "gate": fields["gate"][:, :rows].astype(np.float16),
        "dropped": fields["dropped"][:, :rows].astype(bool),
    }
    of_batch = {"token": batch.tokens_BS, "segment": batch.segment_BS, "domain": batch.domain_BS}
    for name, array in of_batch.items():
        first_rows = np.asarray(array)[:rows]
        # The smallest type that holds the largest value of this file.
        largest = int(first_rows.max(initial=0))
        arrays[name] = first_rows.astype(np.min_scalar_type(largest))
    return arrays


def about(cfg: Config, domains: Sequence[str]) -> dict[str, Any]:
    """Returns what the manifest says of the run."""
    return {
        "config": config_hash(cfg),
        "router": cfg.model.moe.router,
        "num_experts": cfg.model.moe.num_experts,
        "blocks": layout.moe_blocks(cfg.model).tolist(),
        "domains": list(domains),
    }


def config_hash(cfg: Config) -> str:
    """Returns the SHA-256 of what makes the routing: equal on every mesh, and however the layers
    are stored or recomputed.
    """
    blocks = dataclasses.asdict(cfg)
    hashed: dict[str, Any] = {name: blocks[name] for name in SAME_RUN}
    hashed["batch_size"] = cfg.train.batch_size
    for block in ("model", "data"):
        hashed[block] = _of_values(hashed[block])
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _of_values(block: Any) -> Any:
    """Returns a block of keys without those that change no value, in it and in blocks below it."""
    if not isinstance(block, dict):
        return block
    items = block.items()
    return {name: _of_values(value) for name, value in items if name not in SAME_VALUES}


def write_step(
    directory: Path, step: int, arrays: dict[str, np.ndarray], about: dict[str, Any]
) -> None:
    """Writes the file of a step and its line in the manifest; replaces a file of the same step."""
    directory.mkdir(parents=True, exist_ok=True)
    # Packed in memory first, so that the file and its hash are of the same bytes.
    buffer = io.BytesIO()
    # Any, for its keyword arguments are the arrays.
    save: Any = np.savez_compressed
    save(buffer, **arrays)
    content = buffer.getvalue()
    name = file_name(step)
    _replace(directory / name, content)

    path = directory / MANIFEST
    # The manifest goes on from earlier starts of the run.
    files = json.loads(path.read_text())["files"] if path.exists() else {}
    files[name] = {
        "step": step,
        "sha256": hashlib.sha256(content).hexdigest(),
        "arrays": {key: [str(z.dtype), list(z.shape)] for key, z in arrays.items()},
    }
    manifest = {**about, "files": dict(sorted(files.items()))}
    _replace(path, (json.dumps(manifest, indent=1) + "\n").encode())


def read_step(directory: Path, step: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a step. Raises UserError when it was not recorded."""
    path = directory / file_name(step)
    if not path.exists():
        stems = [file.stem.removeprefix("step_") for file in directory.glob("step_*.npz")]
        recorded = sorted(int(stem) for stem in stems if stem.isdecimal())
        raise UserError(
            f"no routing of step {step} is recorded in {directory}: it has {recorded or 'none'} "
            "(record.steps)"
        )
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def file_name(step: int) -> str:
    return f"step_{step:08d}.npz"


def _replace(path: Path, content: bytes) -> None:
    """Writes a file in one atomic step: a kill leaves the old content or the new."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
