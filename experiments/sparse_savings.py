"""What do zeros in the experts save, on this machine? Parameters, bytes, memory, FLOPs and time of
each pattern against dense experts.

    # the table of patterns, about two minutes on two CPU cores
    python experiments/sparse_savings.py models
    # dense, block and CSR products by density: where they cross, two minutes
    python experiments/sparse_savings.py products

`models`: one decoder (2 MoE blocks, D 256, 8 experts of 1024, top-2) with random weights and the
zeros of each pattern, as `convert compact` stores it. Nothing is trained: what it costs does not
depend on the values. `products`: one matrix [512, 1024]. All variants are timed in turn, round by
round; reported are medians, and medians of each round's ratio to dense.
"""

import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCOO

from configs import base
from experiments.command_line import Flags, launch
from experiments.writing import show
from moe_jax import checkpoint, config
from moe_jax.commands.conversions.compact import bytes_of
from moe_jax.errors import UserError
from moe_jax.models.functions import make_model
from moe_jax.moe import sparse
from moe_jax.moe.sparse import stored
from moe_jax.parallel import batch_rows, mesh
from moe_jax.run import write_run
from moe_jax.surgery.compacting import Asked, shrunk
from moe_jax.surgery.weights import Weights, compare
from moe_jax.tasks import TASKS
from moe_jax.terminal.table import Table, names, numbers

SIZES = {
    "model.d_model": 256,
    "model.repeats": 2,
    "model.moe.expert_hidden": 1024,
    "data.seq_len": 256,
    "model.allow_leak": True,
}
ZEROS = {
    "dense": {},
    "unstructured 25 %": {"rule": "static", "patterns.unstructured.density": 0.25},
    "2:4": {"rule": "static", "pattern": "n_m"},
    "blocks 64, 25 %": {
        "rule": "static",
        "pattern": "blocks",
        "patterns.blocks.block": 64,
        "patterns.blocks.density": 0.25,
    },
    "units 25 %": {"rule": "static", "pattern": "units", "patterns.units.density": 0.25},
}
BATCHES = {"1024 tokens": (4, 256), "8 tokens": (1, 8)}


def models(rounds: int) -> None:
    times: dict[str, dict[str, Callable[[], Any]]] = {name: {} for name in BATCHES}
    rows: dict[str, list[str]] = {}
    with (
        jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])),
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, zeros in ZEROS.items():
            weights = compacted(first(zeros), Path(folder) / name)
            rows[name] = sizes(weights, Path(folder) / name)
            for batch, shape in BATCHES.items():
                times[batch][name] = forward(weights, *shape)
        measured = {batch: medians(runs, rounds) for batch, runs in times.items()}
    columns = (
        "parameters",
        "not zero",
        "on disk, MB",
        "zlib, MB",
        "memory, MB",
        "FLOPs of experts",
        *measured,
    )
    table = Table([*names("experts"), *numbers(*columns)])
    for name, cells in rows.items():
        timed = [f"{m[name][0] * 1e3:.1f} ms ({m[name][1]:.2f})" for m in measured.values()]
        table.add(name, *cells, *timed)
    show(table)


def first(zeros: Mapping[str, Any]) -> Weights:
    """First values with the zeros of a rule, as a run would begin."""
    c = base.get_config()
    c.update_from_flattened_dict(
        {**SIZES, **{f"model.moe.sparse.{key}": value for key, value in zeros.items()}}
    )
    raw = c.to_dict()
    cfg = config.build({**raw, "mesh": mesh.ONE.written()}, 1)

    def init(key: jax.Array) -> Any:
        params, router_state = make_model(cfg.model).init(key)
        return sparse.begin(cfg.model.moe.sparse, params, stacked=False)[0], router_state

    params, router_state = jax.device_get(jax.jit(init)(jax.random.key(0)))
    return Weights(
        {**raw, "mesh": mesh.ONE.written()},
        {"params": params, "router_state": router_state},
        0,
    )


def compacted(old: Weights, out: Path) -> Weights:
    asked = Asked(Path("the model"), "auto", 0)
    notes, new = shrunk(old, asked)
    write_run(out, new.raw, jax.tree.map(jax.numpy.asarray, new.parts), new.step)
    print("\n".join(notes), f"; outputs deviate by {compare(old, new):.1e}\n", flush=True)
    return new


def sizes(weights: Weights, out: Path) -> list[str]:
    """Parameters, those of them that are not zero, megabytes on disk, compressed and in memory,
    FLOPs of a token's experts.
    """
    arrays = jax.tree.leaves(weights.parts["params"])
    count, alive = sum(x.size for x in arrays), sum(int(np.count_nonzero(x)) for x in arrays)
    packed = sum(len(zlib.compress(np.ascontiguousarray(x).tobytes(), 6)) for x in arrays)
    experts = sum(
        x.size // x.shape[0]
        for _, layer in sparse.experts_of(weights.parts["params"])
        for x in layer.values()
    )
    flops = 2 * 2 * experts  # two experts a token; a multiply-add is two

    def mega(n):
        return f"{n / 1e6:.2f}"

    held = sum(x.nbytes for x in arrays)
    return [
        f"{count:,}",
        f"{alive:,}",
        mega(bytes_of(out, 0)),
        mega(packed),
        mega(held),
        f"{flops / 1e6:.2f} M",
    ]


def forward(weights: Weights, rows: int, length: int) -> Callable[[], Any]:
    raw = {
        **weights.raw,
        "train": {**weights.raw["train"], "batch_size": rows},
        "data": {**weights.raw["data"], "seq_len": length},
    }
    cfg = config.build(raw, 1)
    task, model = TASKS[cfg.task], make_model(cfg.model)
    batch = batch_rows.put(task.random(cfg, 0), np.arange(rows), rows)
    like = jax.eval_shape(model.init, jax.random.key(0))

    def on_mesh(x, like):
        return jax.device_put(x, checkpoint.flat.placement(like))

    parts = jax.tree.map(on_mesh, (weights.parts["params"], weights.parts["router_state"]), like)
    run = jax.jit(
        lambda p, s, b: task.losses(model.bind(p, s), b, jax.random.key(0), False).outputs
    )
    return lambda: jax.block_until_ready(run(*parts, batch))


def products(rounds: int) -> None:
    """One matrix product at several densities: whole, as blocks (sparse/stored.py), scipy's CSR
    (one thread), jax's BCOO.
    """
    rng = np.random.default_rng(0)
    d, f = 512, 1024
    cases = [f"{kind} {100 * density:.3g} %" for kind, density in CASES]
    table = Table([*names("rows"), *numbers("whole, ms", "whole with 90 % zeros", *cases)])
    for rows in (1, 8, 64, 1024):
        x, w = rng.normal(size=(rows, d)).astype("f"), rng.normal(size=(d, f)).astype("f")
        few = w * (rng.random(w.shape) < 0.1)
        whole = jax.jit(lambda x, w: x @ w)
        runs = {"whole": run_whole(whole, x, w), "zeros": run_whole(whole, x, few)}
        for kind, density in CASES:
            runs[f"{kind} {density}"] = RUNS[kind.split()[0]](x, w, kind, density)
        found = medians(runs, rounds)
        ratios = [f"{ratio:.2f}" for name, (_, ratio) in found.items() if name != "whole"]
        table.add(str(rows), f"{found['whole'][0] * 1e3:.3f}", *ratios)
    show(table)


CASES = [("blocks 32", p) for p in (0.125, 0.25, 0.375, 0.5, 0.75)]
CASES += [("blocks 64", p) for p in (0.125, 0.25, 0.375, 0.5, 0.75)]
CASES += [("blocks 128", p) for p in (0.25, 0.5, 0.75)]
CASES += [("CSR", p) for p in (0.01, 0.05, 0.1, 0.25, 0.5)] + [("BCOO", 0.01), ("BCOO", 0.1)]


def run_whole(whole: Callable, x: np.ndarray, w: np.ndarray) -> Callable[[], Any]:
    x, w = jnp.asarray(x), jnp.asarray(w)
    return lambda: whole(x, w).block_until_ready()


def run_blocks(x: np.ndarray, w: np.ndarray, kind: str, density: float) -> Callable[[], Any]:
    """Balanced: as many random blocks in every column."""
    b = int(kind.split()[1])
    n, rng = max(1, round(density * w.shape[0] / b)), np.random.default_rng(1)
    keep = np.stack([rng.permutation(w.shape[0] // b) < n for _ in range(w.shape[1] // b)], 1)
    values, places = stored.pack((w * np.kron(keep, np.ones((b, b))))[None].astype("f"), b, n)
    args = jnp.asarray(x), jnp.asarray(values[0]), jnp.asarray(places[0])
    run = jax.jit(stored.product)
    return lambda: run(*args).block_until_ready()


def run_csr(x: np.ndarray, w: np.ndarray, kind: str, density: float) -> Callable[[], Any]:
    matrix = scipy.sparse.csr_matrix((w * (np.random.default_rng(1).random(w.shape) < density)).T)
    columns = np.ascontiguousarray(x.T)
    return lambda: matrix @ columns


def run_bcoo(x: np.ndarray, w: np.ndarray, kind: str, density: float) -> Callable[[], Any]:
    """The sparse format that XLA compiles."""
    matrix = BCOO.fromdense(
        jnp.asarray((w * (np.random.default_rng(1).random(w.shape) < density)).T)
    )
    run = jax.jit(lambda matrix, columns: matrix @ columns)
    columns = jnp.asarray(x.T)
    return lambda: run(matrix, columns).block_until_ready()


RUNS = {"blocks": run_blocks, "CSR": run_csr, "BCOO": run_bcoo}


def medians(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """{name: (median seconds, median of its ratio to the first of the same round)}."""
    for run in runs.values():
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in (
            names[number % len(names) :] + names[: number % len(names)]
        ):  # nobody always follows the same
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))

    def ratio(values):
        return statistics.median(a / b for a, b in zip(values, first, strict=True))

    return {name: (statistics.median(values), ratio(values)) for name, values in seconds.items()}


def work(argv: list[str]) -> None:
    parser = Flags(__doc__)
    parser.add_argument("what", choices=("models", "products"))
    parser.add_argument("--rounds", type=int, default=15, help="of timing (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be at least 1")
    {"models": models, "products": products}[args.what](1 if args.smoke else args.rounds)


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
