"""A model in another form.

    python -m moe_jax convert compact --workdir RUN --out DIR

A run without its experts' zeros: zero hidden units are removed, and zero blocks where that pays;
the outputs stay the same (docs/sparse_weights.md).

    python -m moe_jax convert export --workdir RUN --to DIR
    python -m moe_jax convert import --from DIR --out RUN

A run as a model of Hugging Face, and a model of Hugging Face as a run (docs/interchange.md).

A language model is read by `generate` and `probe`, and that of any task (whole matrices) by
train.init_from.
"""

import argparse
import contextlib
import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import checkpoint, config
from moe_jax.checkpoint import flat
from moe_jax.errors import UserError
from moe_jax.interchange.exporting import DTYPES, export_model
from moe_jax.interchange.families import FAMILIES
from moe_jax.interchange.importing import import_model
from moe_jax.models.functions import make_model
from moe_jax.moe import sparse
from moe_jax.moe.sparse import compact
from moe_jax.parallel import batch_rows, mesh
from moe_jax.run import Run, open_run, write_run
from moe_jax.runtime import shell
from moe_jax.tasks import TASKS

# How far outputs may move, relative to the largest.
LIMIT = 1e-6
ROWS = 8  # of the random inputs
# What a run keeps beside its tokenizer (data/examples.py).
KEPT = ("labels.json", "items.json")


class Weights(NamedTuple):
    """A model on the host: its config as JSON has it, and its arrays by part ("params", "ema" where
    there is one, "router_state").
    """

    raw: dict[str, Any]
    parts: dict[str, Any]
    step: int


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    for name, (declare, _) in CONVERSIONS.items():
        declare(kinds.add_parser(name))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    flags = parse(argv)
    _, run = CONVERSIONS[flags.what]
    return run(flags)


# compact


def declare_compact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of the run that trained the model"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--format",
        choices=("auto", "dense", "blocks"),
        default="auto",
        help="of the experts: whole matrices, blocks (for inference alone), or blocks where they "
        "are faster (default)",
    )
    parser.add_argument(
        "--block", type=int, default=0, help="side of a block (default: that of the pattern blocks)"
    )


def run_compact(flags: argparse.Namespace) -> int:
    """Returns 0, or 1 when the outputs moved too far."""
    refuse_filled("--out", flags.out)
    if flags.block and flags.format == "dense":
        raise UserError(
            f"--format dense writes whole matrices, so --block {flags.block} would do nothing: "
            "leave one out"
        )
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        old = read(open_run(flags.workdir, flags.step))
        notes, new = shrunk(old, flags)
        deviation = written(old, new, flags)
    report(old, new, notes, flags)
    shell.tell(
        f"outputs on random inputs: largest deviation {deviation:.1e} of the largest output, "
        f"float32 (limit {LIMIT:.0e})"
    )
    if deviation > LIMIT:
        shell.tell(f"{flags.out} does not compute the same: do not use it")
        return 1
    shell.tell(f"written: {flags.out}")
    return 0


def written(old: Weights, new: Weights, flags: argparse.Namespace) -> float:
    """Writes --out, and returns the deviation of what it holds then.

    It is taken away again when anything fails, for nobody has compared it.
    """
    with new_directory(flags.out):
        write(flags.workdir, flags.out, new)
        # Read from the disk: what is compared is what others will read.
        return compare(old, read(open_run(flags.out, silent=True)))


def read(trained: Run) -> Weights:
    """Returns the arrays of a run on the host."""
    parts = {"params": trained.parameters, "router_state": trained.router_state}
    if trained.moving_average is not None:
        parts["ema"] = trained.moving_average
    return Weights(trained.raw, jax.device_get(parts), trained.step)


def shrunk(old: Weights, flags: argparse.Namespace) -> tuple[list[str], Weights]:
    """Returns what was done, a line for each, and the model without its zeros."""
    zeros = old.raw["model"]["moe"]["sparse"]
    # The moving average has experts of its own, which must fit the same widths.
    models = {name: tree for name, tree in old.parts.items() if name != "router_state"}
    layers = [layer for tree in models.values() for _, layer in sparse.experts_of(tree)]
    whole = all(set(layer) == {"w_in", "w_out"} for layer in layers)
    if zeros["stored"]["block"] or not layers or not whole:
        raise UserError(
            f"{flags.workdir} has no experts of two whole matrices (w_in and w_out), so there is "
            "nothing to compact"
        )
    block = flags.block or zeros["patterns"][zeros["pattern"]].get("block", 0)
    hidden, note = new_width(old.raw, layers, block if flags.format != "dense" else 0)
    notes = [note]
    raw = copy.deepcopy(old.raw)
    moe = raw["model"]["moe"]
    # Shared experts are one matrix: their number is its width over that of an expert.
    if not moe["shared_hidden"]:
        moe["shared_experts"] = moe["shared_experts"] * moe["expert_hidden"] // hidden
    moe["expert_hidden"], moe["sparse"]["rule"] = hidden, "none"
    # By identity, for a layer is a dict.
    narrow = {id(layer): compact.narrow(layer, hidden) for layer in layers}
    form, note = block_format(list(narrow.values()), block, flags)
    if note:
        notes.append(note)
    if form:
        moe["sparse"]["stored"] = {"block": form.block, "w_in": form.w_in, "w_out": form.w_out}

    def converted(tree: Any) -> Any:
        values = {}
        for path, layer in sparse.experts_of(tree):
            matrices = narrow[id(layer)]
            stored = compact.packed(matrices, form) if form else {"experts": matrices}
            values |= {(*path[:-1], part): value for part, value in stored.items()}
        return with_paths(tree, values)

    parts = {name: converted(tree) if name in models else tree for name, tree in old.parts.items()}
    return notes, Weights(raw, parts, old.step)


def with_paths(tree: Any, values: Mapping[tuple, Any]) -> Any:
    """Returns nested dicts with other values at some paths, new ones too."""
    # New dicts, so that the old ones stay as they are.
    tree = jax.tree.map(lambda x: x, tree)
    for path, value in values.items():
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
    return tree


def new_width(
    raw: Mapping[str, Any], layers: Sequence[compact.Layer], block: int
) -> tuple[int, str]:
    """Returns expert_hidden, and why it is that."""
    moe, axis = raw["model"]["moe"], max(1, raw["mesh"]["model"])
    hidden, least = moe["expert_hidden"], compact.least_hidden(layers)
    multiple = math.lcm(axis, block or 1)
    # Those of a width of their own stay as they are.
    tied = 0 if moe["shared_hidden"] else moe["shared_experts"]
    width = next(compact.widths(least, hidden, multiple, tied), hidden)
    reasons = [f"the fullest expert of all layers has {least} living units of {hidden}"]
    if axis > 1:
        reasons.append(f"a multiple of mesh.model = {axis}")
    if block:
        reasons.append(f"a multiple of the block {block}")
    if tied:
        reasons.append(f"a divisor of {tied} shared experts x {hidden}")
    return width, f"model.moe.expert_hidden {hidden} -> {width}: {', '.join(reasons)}"


def block_format(
    layers: list[compact.Layer], block: int, flags: argparse.Namespace
) -> tuple[Any, str]:
    """Returns compact.Blocks, or None for whole matrices, and what to tell."""
    if flags.format == "dense" or (flags.format == "auto" and not block):
        return None, ""
    if not block:
        raise UserError("--format blocks needs the side of a block: --block 64")
    # w_in is [E, D, P, F].
    _, d_model, _, hidden = layers[0]["w_in"].shape
    if d_model % block or hidden % block:
        raise UserError(
            f"--block {block} must divide model.d_model ({d_model}) and the experts' hidden width "
            f"({hidden})"
        )
    form = compact.blocks(layers, block)
    text = (
        f"blocks of {block} x {block}: the fullest columns have {form.w_in} and {form.w_out}, "
        f"{form.share:.0%} of the matrices"
    )
    limit = compact.pays(block)
    if flags.format == "auto" and form.share > limit:
        text += f"; blocks of this side are faster up to {limit:.0%}, so whole matrices stay"
        return None, text
    return form, f"{text}; stored so, for inference alone"


def write(workdir: Path, out: Path, new: Weights) -> None:
    """Writes the new checkpoint, its config, and whatever the run keeps for decoding (tokenizer,
    names of labels).
    """
    write_run(out, new.raw, jax.tree.map(jax.numpy.asarray, new.parts), new.step)
    if (workdir / "tokenizer").is_dir():
        shutil.copytree(workdir / "tokenizer", out / "tokenizer")
    for name in KEPT:
        if (workdir / name).is_file():
            shutil.copy2(workdir / name, out / name)


def compare(old: Weights, new: Weights) -> float:
    """Returns the largest |difference| of outputs over the largest |output|, on random inputs of
    the task, in float32.
    """

    def far(a, b):
        # Outputs that are all 0 have no size to divide by.
        return float(np.abs(a - b).max()) / max(float(np.abs(a).max()), 1e-30)

    before, after = jax.tree.leaves(forward(old)), jax.tree.leaves(forward(new))
    return max(far(a, b) for a, b in zip(before, after, strict=True))


def forward(weights: Weights) -> Any:
    """Returns the outputs of a model on one device, on random inputs of its task."""
    raw = copy.deepcopy(weights.raw)
    raw["model"] |= {"scan": False, "dtype": "float32", "param_dtype": "float32"}
    raw |= {"mesh": mesh.ONE.written(), "simulate_devices": 0}
    raw["train"] |= {"batch_size": ROWS, "micro_batch_size": 0}
    raw["eval"] |= {"batch_size": ROWS}
    # One group for each row, so that ROWS fit whatever the run had.
    raw["model"]["moe"]["group_rows"] = 1
    cfg = config.build(raw, 1)
    task, model = TASKS[cfg.task], make_model(cfg.model)
    batch = batch_rows.put(task.random(cfg, 0), np.arange(ROWS), ROWS)
    like = jax.eval_shape(model.init, jax.random.key(0))

    def on_mesh(x, like):
        return jax.device_put(x.astype(like.dtype), flat.placement(like))

    arrays = weights.parts["params"], weights.parts["router_state"]
    params, router_state = jax.tree.map(on_mesh, arrays, like)

    # The batch is an argument: as a constant of the program it would lose how its rows are placed.
    def run(params, state, batch):
        return task.losses(model.bind(params, state), batch, jax.random.key(0), False).outputs

    return jax.device_get(jax.jit(run)(params, router_state, batch))


def report(old: Weights, new: Weights, notes: list[str], flags: argparse.Namespace) -> None:
    """Tells what was done, and how much smaller the model is."""
    for note in notes:
        shell.tell(note)
    kept, every = compact.nonzero(layer for _, layer in sparse.experts_of(old.parts["params"]))
    shell.tell(f"experts: {kept:,} of {every:,} weights were not zero ({kept / every:.1%})")
    before, after = parameters_of(old), parameters_of(new)
    shell.tell(f"parameters: {before:,} -> {after:,} ({after / before:.1%})")
    before, after = bytes_of(flags.workdir, old.step), bytes_of(flags.out, new.step)
    shell.tell(f"checkpoint on disk, optimizer included before: {before:,} -> {after:,} bytes")


def parameters_of(weights: Weights) -> int:
    return sum(array.size for array in jax.tree.leaves(weights.parts["params"]))


def bytes_of(workdir: Path, step: int) -> int:
    saves = checkpoint.Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)
    files = [path for path in Path(saves.path(step)).rglob("*") if path.is_file()]
    return sum(file.stat().st_size for file in files)


# import


def declare_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="a folder with config.json and safetensors, as save_pretrained writes it",
    )
    parser.add_argument("--out", type=Path, required=True, help="a new directory, of the run")
    parser.add_argument(
        "--seq_len",
        type=int,
        help="tokens of a row (default: max_position_embeddings, at most 4096)",
    )
    parser.add_argument(
        "--mesh",
        default="",
        help="DATAxEXPERTxMODEL: put it together on these devices, each its own part (default: in "
        "the memory of the host)",
    )
    parser.add_argument(
        "--simulate_devices", type=int, default=0, help="CPU devices to simulate for --mesh"
    )


def run_import(flags: argparse.Namespace) -> int:
    """Returns 0; the directory is taken away again when anything fails."""
    if flags.seq_len is not None and flags.seq_len < 1:
        raise UserError(f"--seq_len {flags.seq_len} must be at least 1")
    refuse_filled("--out", flags.out)
    lengths = import_mesh(flags)
    with new_directory(flags.out):
        done = import_model(flags.source, flags.out, flags.seq_len, lengths)
    model = done.config.model
    shell.tell(
        f"{done.family}: {done.num_tensors:,} tensors, {done.num_parameters:,} parameters in "
        f"{model.param_dtype}, {len(model.blocks)} blocks"
    )
    for note in done.notes:
        shell.tell(note)
    shell.tell(f"written: {flags.out} (train on: --config {flags.out / 'config.py'})")
    return 0


def import_mesh(flags: argparse.Namespace) -> mesh.Lengths | None:
    """Returns the lengths of --mesh; None without one. Raises UserError where the devices are not
    as many.
    """
    if flags.simulate_devices:
        if not flags.mesh:
            raise UserError(
                f"--simulate_devices {flags.simulate_devices} does nothing without --mesh: name a "
                "mesh, as in --mesh 2x2x2"
            )
        mesh.simulate(flags.simulate_devices)
    if not flags.mesh:
        return None
    lengths, there = mesh.parse(flags.mesh, "--mesh"), len(jax.devices())
    if lengths.num_devices != there:
        raise UserError(
            f"--mesh {flags.mesh} has {lengths.num_devices} devices, and there are {there}: name "
            "another, or set --simulate_devices"
        )
    return lengths


# export


def declare_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of the run that trained the model"
    )
    parser.add_argument("--to", type=Path, required=True, help="a new directory")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--family",
        choices=tuple(FAMILIES),
        default="",
        help="of models (default: the first that can express the run)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="", help="of the tensors (default: of the parameters)"
    )
    parser.add_argument(
        "--like",
        type=Path,
        help="the folder of the model that the run began from: its tokenizer, chat template and "
        "ids of special tokens are taken",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the parameters themselves, not their moving average (optim.ema_decay)",
    )
    parser.add_argument(
        "--shard_mb", type=int, default=1000, help="MB of a file, at most (default 1000)"
    )


def run_export(flags: argparse.Namespace) -> int:
    """Returns 0; the directory is taken away again when anything fails."""
    if flags.shard_mb < 1:
        raise UserError(f"--shard_mb {flags.shard_mb} must be at least 1")
    refuse_filled("--to", flags.to)
    trained = open_run(flags.workdir, flags.step)
    if flags.raw and not trained.config.optim.ema_decay:
        raise UserError(
            "--raw: the run kept no moving average of its parameters (optim.ema_decay = 0): leave "
            "the flag out"
        )
    with new_directory(flags.to), jax.set_mesh(mesh.of_host()):
        done = export_model(
            trained,
            flags.to,
            family=flags.family,
            dtype=flags.dtype,
            like=flags.like,
            raw=flags.raw,
            shard_bytes=flags.shard_mb * 10**6,
        )
    shell.tell(f"{done.family}: {done.num_tensors:,} tensors, {done.num_bytes:,} bytes")
    for note in done.notes:
        shell.tell(note)
    shell.tell(f"written: {flags.to}")
    return 0


# All of them.


def refuse_filled(flag: str, folder: Path) -> None:
    """Raises UserError for a directory that has something in it."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"{flag} {folder} is not empty: name a new directory")


@contextlib.contextmanager
def new_directory(folder: Path) -> Iterator[None]:
    """Makes a directory, and takes it away again when what is done inside fails."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    # An interrupt too.
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# By WHAT: the function that declares its flags, and the one that runs it.
Declare = Callable[[argparse.ArgumentParser], None]
CONVERSIONS: dict[str, tuple[Declare, Callable[[argparse.Namespace], int]]] = {
    "compact": (declare_compact, run_compact),
    "import": (declare_import, run_import),
    "export": (declare_export, run_export),
}
